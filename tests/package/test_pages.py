"""The README and the pages of docs/: snippets run, tables are true, links lead somewhere."""

import contextlib
import inspect
import io
import itertools
import json
from pathlib import Path
import re

import optax
import pytest

import cases
import record_dialects
from rmsprop_jax import describe, dialects, low_memory, recipes, rmsprop, scale_by_rms

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "examples/README.md",
    "benchmarks/README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


def text(page):
    return (ROOT / page).read_text()


def assert_prints(code, printed, names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "a page", "exec"), names)
    assert out.getvalue() == printed


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(text(page))])
def test_snippets_of_a_page_run_one_after_the_other(page, default_promotion):
    names = {"__name__": "__page__"}
    for code, printed in SNIPPET.findall(text(page)):
        assert_prints(code, printed, names)


def rows(page, heading):
    """The cells of the first table after some words."""
    lines = text(page).split(heading, 1)[1].splitlines()
    table = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    _, _, *table = itertools.takewhile(lambda line: line.startswith("|"), table)
    return [[cell.strip() for cell in line.strip("| ").split(" |")] for line in table]


WHICH = "docs/which.md"
DIALECTS = rows(WHICH, "## Dialects") + rows(WHICH, "### Frameworks without")
CALLS = [
    *(row[1] for row in DIALECTS),
    *(
        row[1].split("`, ")[0]
        for page in ("docs/how-to/from-pytorch.md", "docs/how-to/from-keras-and-tensorflow.md")
        for row in rows(page, "### You wrote X, write Y")
    ),
    *(row[0] for row in rows(WHICH, "## Recipes: published settings")),
]


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("`")])
def test_what_to_write_can_be_written(call):
    """Each call in the tables of dialects and recipes."""
    names = {
        "optax": optax,
        "dialects": dialects,
        "recipes": recipes,
        "rmsprop": rmsprop,
        "scale_by_rms": scale_by_rms,
        "schedule": optax.constant_schedule(0.1),
        "labels": {"w": "a", "v": "b"},
        "steps_per_epoch": 100,
    }
    tx = eval(call.strip("`"), names)
    assert "x <- x - " in describe(tx)
    tx.init({"w": 1.0, "v": 1.0})


def test_the_table_of_bytes_is_measured():
    """By XLA, of whole steps; mixed precision has gradients of 2 bytes there."""
    results = json.loads((ROOT / "benchmarks/results/training_memory.json").read_text())["rows"]
    peaks = {(row["training"], row["form"]): float(row["peak"]) for row in results}
    found = rows("docs/how-to/small-state.md", "## Train in half the memory")
    assert len(found) == 7
    for training, *parts, plain, momentum, _ in found:
        way = training.replace("`master_weights`, ", "master weights of ")
        assert float(plain) == pytest.approx(peaks[way, "plain"], abs=0.03)
        assert float(momentum) == pytest.approx(peaks[way, "momentum"], abs=0.03)
        assert sum(float(part) for part in parts if part) == float(plain)


def test_all_dialects_and_recipes_are_listed():
    for module in (dialects, recipes):
        name = module.__name__.split(".")[-1]
        assert all(f"`{name}.{one}(" in text(WHICH) for one in module.__all__)


def test_the_table_of_dialects_is_true():
    """ε, start value and the learning rate's place, as the calls beside them have it."""
    for _, call, eps, start, rate, decay in DIALECTS:
        rule = eval(call.strip("`"), {"dialects": dialects, "rmsprop": rmsprop}).part
        assert float(re.search(r"1e-\d+", eps)[0]) == rule.hyper.eps, call
        outside = eps.startswith("outside") or "outside without" in eps
        assert outside == (not rule.variant.eps_in_sqrt), call
        assert float(start) == rule.initial_scale, call
        assert rate.startswith("after") == (not rule.variant.lr_in_momentum), call
        if number := re.search(r"0\.\d+", rate):
            assert float(number[0]) == rule.hyper.learning_rate, call
        make = getattr(dialects, call.strip("`").split(".")[-1].split("(")[0], rmsprop)
        if make is not rmsprop:
            assert (decay != "none") == ("weight_decay" in inspect.signature(make).parameters)


def test_the_table_of_errors_is_of_the_recorded_runs():
    compared = {row[0].strip("`"): row[1:] for row in rows(WHICH, "### How exact the dialects are")}
    assert list(compared) == list(cases.CASES)
    for framework, (equals, runs, *errors) in compared.items():
        record = record_dialects.load(framework)
        assert equals.endswith(str(record["version"]))
        assert int(runs) == 2 * sum(not case.constant for case in cases.CASES[framework])
        limits = [1e-11, 5e-5, 5e-5]
        assert all(float(e) <= limit for e, limit in zip(errors, limits, strict=True) if e)


def anchors(page):
    """Of its headings, as GitHub makes them."""
    without_code = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    page = ROOT / page
    without_code = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not heading or heading in anchors(there), target


def test_the_guide_speaks_of_examples_that_are_there():
    guide = (ROOT / "docs" / "guide.md").read_text()
    scripts = re.findall(r"`(\w+\.py)[ \w-]*`", guide)
    assert len(set(scripts)) >= 8
    for script in scripts:
        assert (ROOT / "examples" / script).is_file(), script
    names = {"dialects": dialects, "recipes": recipes, "low_memory": low_memory, "optax": optax}
    for module, name in re.findall(r"`(dialects|recipes|low_memory|optax)\.([\w.]+)", guide):
        thing = names[module]
        for part in name.split("."):
            thing = getattr(thing, part)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_exist(page):
    """Each make target and each script that a page names."""
    makefile = text("Makefile")
    for target in re.findall(r"^make ([\w-]+)", text(page), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python ((?:examples|benchmarks|tests)/\S+\.py)", text(page)):
        assert (ROOT / script).is_file(), script


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


def test_the_gallery_has_every_example_and_picture():
    folder = ROOT / "examples"
    text = (folder / "README.md").read_text()
    shown = re.findall(r"!\[.+\]\((pictures/\w+\.png)\)", text)
    assert sorted(shown) == sorted(str(p.relative_to(folder)) for p in folder.glob("pictures/*"))
    for script in folder.glob("*.py"):
        assert script.name in text or script.name == "real_data.py", script
