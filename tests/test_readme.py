"""Every snippet of the README runs, and prints what stands below it; so do its tables."""

import contextlib
import io
import json
from pathlib import Path
import re

import pytest

import _timing
import step

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(code, printed):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "__readme__"})
    assert out.getvalue() == printed


def test_there_are_snippets():
    assert len(SNIPPETS) >= 6


def test_the_benchmark_table_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    assert _timing.table(results["rows"], results["machine"]) in README


def test_the_benchmark_runs(capsys):
    rows = step.main(["--quick"])
    assert [row["form"] for row in rows] == [*step.FORMS] * 3
    assert _timing.table(rows, _timing.machine()) in capsys.readouterr().out


def test_links_and_pictures_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_commands_exist():
    """Each make target and each script that the README names."""
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python ((?:examples|benchmarks|tests)/\S+\.py)", README):
        assert (ROOT / script).is_file(), script
