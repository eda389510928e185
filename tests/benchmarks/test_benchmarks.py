"""The benchmarks run, count correctly, and their page shows their results."""

import functools
import itertools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import _correctness
import _results
import _timing
import accuracy
import compilation
import eager
import libraries
import low_memory_step
import many_leaves
import memory
import on_gpu
from pictures import assert_picture
import reference
import report
from rmsprop_jax import rmsprop
import rows
import scaling
import step
import trees

pytestmark = pytest.mark.usefixtures("default_promotion")  # as their users run them

# How many rows --quick gives, and how many where all is small.
BENCHMARKS = {
    step: (10, 4),
    eager: (3, 1),
    compilation: (3, 1),
    memory: (9, 3),
    accuracy: (2, 2),
    low_memory_step: (7, 3),
    many_leaves: (4, 2),
    scaling: (16, 4),
    rows: (2, 2),
}


@pytest.fixture(autouse=True)
def _optax_only(monkeypatch):
    """Wherever other libraries are installed: they are slow to import."""
    monkeypatch.setattr(libraries, "others", lambda: {"optax": libraries.theirs})


def assert_runs(benchmark, rows, capsys, monkeypatch):
    monkeypatch.setattr(_results, "save", lambda *_: pytest.fail("--quick writes nothing"))
    found = benchmark.main(["--quick"])
    assert len(found) == rows
    assert _results.table(found, _results.machine()) in capsys.readouterr().out
    for row in found:
        assert [*row] == [*found[0]]


def name(benchmark):
    return benchmark.__name__


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name)
def test_a_benchmark_runs(benchmark, capsys, monkeypatch):
    assert_runs(benchmark, BENCHMARKS[benchmark][0], capsys, monkeypatch)


@pytest.fixture
def small(monkeypatch):
    """One form, one leaf, one way to pack, two devices that are used in two ways."""
    rows = ("plain", "plain, master weights")
    monkeypatch.setattr(step, "ROWS", {name: step.ROWS[name] for name in rows})
    for benchmark in (eager, compilation, memory, low_memory_step, on_gpu):
        monkeypatch.setattr(benchmark, "FORMS", {"plain": {}})
    monkeypatch.setattr(memory, "STEPS", {"cautious": {"momentum": 0.9, "cautious": True}})
    for benchmark in (eager, many_leaves):
        monkeypatch.setattr(benchmark, "small_leaves", lambda leaves: [jnp.ones((3, 7))])
    monkeypatch.setattr(many_leaves, "WAYS", {"by 32": many_leaves.packed})
    monkeypatch.setattr(scaling, "WAYS", ("replicated", "`zero1_mapped`"))
    monkeypatch.setattr(jax, "device_count", lambda: 2)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name)
def test_a_benchmark_runs_in_small(benchmark, small, capsys, monkeypatch):
    assert_runs(benchmark, BENCHMARKS[benchmark][1], capsys, monkeypatch)


ON_GPU = [f"on_gpu_{table}" for tables in on_gpu.SECTIONS for table in tables]


def assert_asks_the_device(folder, capsys):
    assert on_gpu.main(["--quick", "--out", str(folder)]) == 0
    assert sorted(file.stem for file in folder.iterdir()) == sorted(ON_GPU)
    printed = capsys.readouterr().out
    for name in ON_GPU:
        rows = json.loads((folder / f"{name}.json").read_text())["rows"]
        assert rows
        assert _results.table(rows, _results.machine()) in printed
        for row in rows:
            assert [*row] == [*rows[0]]
            if "holds" in row:
                assert row["holds"] == ("" if row["bound"] == "" else "yes")


@pytest.mark.slow
def test_what_is_said_of_gpus_can_be_asked_of_a_device(tmp_path, capsys):
    assert_asks_the_device(tmp_path / "new", capsys)


def test_what_is_said_of_gpus_can_be_asked_in_small(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_correctness, "CASES", {"plain": {}})
    assert_asks_the_device(tmp_path / "new", capsys)


def test_without_a_gpu_only_quick_runs(capsys):
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main([])
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_section_that_fails_leaves_the_others(capsys, monkeypatch):
    def breaks(quick):
        assert quick
        yield "a", {"holds": "no"}
        raise RuntimeError("out of memory")

    def counts(quick):
        yield from (("b", {"holds": holds}) for holds in ("no", "yes", ""))

    monkeypatch.setattr(_results, "write", lambda *_: pytest.fail("nothing asks for a file"))
    monkeypatch.setattr(on_gpu, "SECTIONS", {("a",): breaks, ("b", "not reached"): counts})
    assert on_gpu.main(["--quick"]) == 3
    printed = capsys.readouterr()
    assert "RuntimeError: out of memory" in printed.err
    for found in ([{"holds": "no"}], [{"holds": holds} for holds in ("no", "yes", "")]):
        assert _results.table(found, _results.machine()) in printed.out


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_the_loop_of_the_gpu_is_that_of_the_tests(dtype):
    """Written apart, and in the precision of the gradients."""
    *grads, x = _correctness.ordinary(np.dtype(dtype).name, 12, 100)
    same = {
        "learning_rate": _correctness.RATE,
        "decay": _correctness.DECAY,
        "eps": _correctness.EPS,
    }
    for case in _correctness.CASES.values():
        found = [*_correctness.reference(np.stack(grads), x, **case)]
        # Here x moves: without a pull towards 0, and in the first step, it does not matter.
        want = reference.run(grads, x, **same, **case)
        steps = 1 if "weight_decay" in case else len(grads)
        sizes = np.abs(want).max(axis=0) + np.finfo(np.float64).tiny
        errors = np.abs(np.stack(found) - np.stack(want))[:steps] / sizes
        assert errors.max() < 1e-13


def test_an_update_that_is_wrong_is_found():
    grads, x = _correctness.ordinary("float32", 4, 50), np.zeros(50, np.float32)
    updates = np.stack([*_correctness.reference(grads, x)]).astype(np.float32)
    assert _correctness.largest_error(updates, grads, x, {}) < _correctness.ARITHMETIC
    assert _correctness.largest_error(updates, grads, x, {"momentum": 0.875}) > 0.1
    updates[3, 7] = np.nan
    assert np.isnan(_correctness.largest_error(updates, grads, x, {}))


def test_updates_that_are_not_finite_are_found(monkeypatch):
    """Those of Optax, whose squares overflow."""
    monkeypatch.setattr(_correctness, "rmsprop", optax.rmsprop)
    found = _correctness.compare("float32", {"plain": {}}, 4, 50)["plain"]
    assert found.error < _correctness.ARITHMETIC
    assert not found.finite


def test_bits_that_differ_are_counted():
    a = {"x": np.float32([0.0, 1.0, np.nan]), "y": jnp.ones(4, jnp.bfloat16)}
    assert on_gpu.differing(a, a) == (7, 0)
    b = {"x": np.float32([-0.0, 1.0, np.nan]), "y": a["y"].at[2].set(2)}
    assert on_gpu.differing(a, b) == (7, 2)
    assert on_gpu.differing(None, None) == (0, 0)


def test_what_has_to_move_is_counted():
    shapes, counts = [(64, 128)], 2 * 4  # of steps
    assert on_gpu.needed(rmsprop(0.1), shapes) == 20 * 64 * 128 + counts
    tx = rmsprop(0.1, momentum=0.9, storage=libraries.STORAGES["bfloat16"])
    assert on_gpu.needed(tx, shapes) == 20 * 64 * 128 + counts
    tx = rmsprop(0.1, storage=libraries.STORAGES["q8"])
    assert on_gpu.needed(tx, shapes) == pytest.approx(15 * 64 * 128, rel=0.01)


def test_every_benchmark_is_tested_and_on_the_page():
    scripts = {file.stem for file in report.FOLDER.glob("*.py") if "finish(" in file.read_text()}
    scripts -= {"_results"}
    elsewhere = {"low_memory_quality", "low_precision_quality", "gpu_programs", "training_memory"}
    assert scripts == {one.__name__ for one in BENCHMARKS} | elsewhere
    page = report.PAGES[1].read_text()
    names = sorted(name for _, name, _ in report.TABLE.findall(page))
    assert names == sorted(scripts | {*ON_GPU, "targets"})


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_a_page_is_rendered(page):
    text = page.read_text()
    assert "<!-- table: " in text
    assert report.render(text) == text
    for picture in re.findall(r"\((?:benchmarks/)?pictures/(step|memory)\.png\)", text):
        assert (report.PICTURES / f"{picture}.png").is_file()


def test_the_pictures_are_drawn_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGES", ())
    monkeypatch.setattr(report, "PICTURES", tmp_path / "new")
    report.main()
    drawn = sorted(tmp_path.glob("new/*"))
    assert [file.name for file in drawn] == ["memory.png", "step.png"]
    for file in drawn:
        assert_picture(file)


def test_a_table_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    about = _results.machine() | {"command": "python x.py", "date": "2000-01-01"}
    results = {"machine": about, "rows": [{"a": 1, "b": "two"}, {"a": 3, "b": ""}]}
    (tmp_path / "x.json").write_text(json.dumps(results))
    text = report.render("before\n<!-- table: x -->\nold\n<!-- end -->\nafter\n")
    lines = text.splitlines()
    assert lines[:6] == [
        "before",
        "<!-- table: x -->",
        "| a | b |",
        "| --- | --- |",
        "| 1 | two |",
        "| 3 |  |",
    ]
    assert lines[7].startswith("`python x.py`, 2000-01-01: ")
    assert lines[8:] == ["<!-- end -->", "after"]
    assert report.render(text) == text
    missing = report.render("<!-- table: y -->\nold\n<!-- end -->\n")
    assert missing == "<!-- table: y -->\nNot measured yet.\n<!-- end -->\n"


def test_a_target_is_met_by_all_of_its_rows_or_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [{"ratio": "0.50", "form": "plain"}, {"ratio": "0.80", "form": "momentum"}]
    (tmp_path / "x.json").write_text(json.dumps({"machine": {"command": "x"}, "rows": rows}))
    met = report.Target("a", 0.8, "x", "ratio").row()
    assert (met["measured"], met["met"]) == ("0.50 to 0.80", "yes")
    missed = report.Target("a", 0.7, "x", "ratio").row()
    assert (missed["measured"], missed["met"]) == ("0.50 to 0.80", "no: 1 of 2 rows above")
    missing = report.Target("a", 0.7, "x", "not there").row()
    assert (missing["measured"], missing["met"]) == ("not measured", "")
    plain = report.Target("a", 0.7, "x", "ratio", lambda row: row["form"] == "plain").row()
    assert (plain["measured"], plain["met"]) == ("0.50 to 0.50", "yes")


@pytest.mark.parametrize(
    ("name", "leaves", "numbers"),
    [
        # The numbers that torchvision and the GPT-2 repository give for their networks.
        ("ResNet-50", 161, 25_557_032),
        ("EfficientNet-B7", 711, 66_347_960),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2", 148, 124_439_808),
    ],
)
def test_networks_are_as_large_as_published(name, leaves, numbers):
    shapes = trees.TREES[name]
    assert (len(shapes), trees.parameters(shapes)) == (leaves, numbers)
    assert trees.parameters(shapes) == sum(np.zeros(shape, np.uint8).size for shape in shapes)


def test_sides_take_turns_and_ratios_are_of_pairs(monkeypatch):
    """By a clock that is told how long each call takes."""
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    theirs = itertools.chain([9.0, 9.0], [1.0, 2.0, 4.0])
    ours = itertools.chain([9.0, 9.0], [3.0, 4.0, 4.0])

    def side(name, seconds):
        def run():
            calls.append(name)
            now[0] += next(seconds)

        return run

    pair = _timing.compare((side("theirs", theirs), side("ours", ours)), 3)
    order = ["theirs", "ours"] * 2 + ["ours", "theirs"] + ["theirs", "ours"] + ["ours", "theirs"]
    assert calls == order
    assert (pair.theirs, pair.ours, pair.ratio) == (2.0, 4.0, 2.0)
    assert pair.quartiles == (1.0, 3.0)
    assert pair.per(2)[:2] == (1.0, 2.0)
    assert pair.columns() == {"ratio": "2.00", "quartiles": "1.00 to 3.00"}


@pytest.mark.parametrize("form", libraries.FORMS)
def test_the_same_step_is_timed_of_each_library(form):
    """Ours and Optax's are, after three steps, at the same place."""
    shapes = [(3, 4), (5,)]
    params = []
    for make in (libraries.ours, libraries.theirs):
        one = make(libraries.FORMS[form], shapes)
        one.run(2)
        params.append(one.run(1)[0])
    for a, b in zip(*params, strict=True):
        assert not np.allclose(a, 1, atol=1e-3)
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
def test_packed_leaves_train_like_a_tree():
    shapes = jax.eval_shape(functools.partial(eager.small_leaves, 40))
    row = np.arange(1, 8, dtype=np.float32)
    grads = jax.tree.map(lambda leaf: np.broadcast_to(row, leaf.shape), shapes)

    @functools.partial(jax.jit, static_argnums=0)
    def second(tx, grads):
        _, state = tx.update(grads, tx.init(grads))
        return tx.update(grads, state)

    plain, _ = jax.device_get(second(rmsprop(0.1), grads))
    packed, state = jax.device_get(second(many_leaves.packed(rmsprop(0.1)), grads))
    assert len(jax.tree.leaves(state)) == 2  # count and nu
    for a, b in zip(*map(jax.tree.leaves, (plain, packed)), strict=True):
        assert (a < -0.1).all()
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_bytes_of_the_state_are_those_of_its_arrays():
    shapes = trees.TREES["ResNet-50"]
    for slots, form in enumerate(libraries.FORMS, 1):
        held = memory.state(rmsprop(0.1, **libraries.FORMS[form]), shapes)
        assert held == pytest.approx(4 * slots, abs=1e-6)
    assert memory.state(optax.sgd(0.1), shapes) == 0
    assert memory.bitsandbytes([(4095,)]) == 4
    assert memory.bitsandbytes([(4097,)]) == (4097 + 4 * 17) / 4097


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        eager.main(["--quick", "--device", "tpu"])
    assert "error: --device tpu: " in capsys.readouterr().err
    assert jax.devices()[0].platform == "cpu"  # other tests go on as before


def test_results_of_an_accelerator_are_named_after_it(tmp_path, monkeypatch):
    class Device:
        platform = "gpu"
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    assert _results.save("x", [{"a": 1}]) == tmp_path / "x.json"
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert _results.save("x", [{"a": 1}]) == tmp_path / "x_NVIDIA_H200.json"
    assert json.loads((tmp_path / "x_NVIDIA_H200.json").read_text())["rows"] == [{"a": 1}]
