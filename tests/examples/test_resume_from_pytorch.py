"""The example resume_from_pytorch.py, compared with recorded runs and with PyTorch if installed.

A run resumed in JAX has the losses of the uninterrupted PyTorch run to within 1e-5: float32 sums in
a different order, over ten steps with losses of size 1.
"""

from pathlib import Path
import sys
import tomllib
import types

from flax import nnx
import jax
import numpy as np
import pytest

from pictures import assert_picture
import record_resume
import resume_from_pytorch as example

RECORD = record_resume.load()
SWITCH = record_resume.SWITCH
TRAIN = example.train
FLAGS = {"plain": [], "full": ["--learning-rate", "1e-3", "--momentum", "0.9", "--centered"]}


def train(checkpoint):
    """Our losses after the checkpoint."""
    return TRAIN(checkpoint, RECORD["x"], RECORD["y"], record_resume.EPOCHS - SWITCH)


@pytest.mark.parametrize("run", record_resume.RUNS)
def test_the_run_goes_on_as_if_pytorch_had_not_stopped(run):
    losses = train(record_resume.checkpoint(RECORD, run))
    np.testing.assert_allclose(losses, RECORD[f"{run}/losses"][SWITCH:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("slot", ["square_avg", "grad_avg", "momentum_buffer"])
def test_each_slot_counts(slot):
    """Without it the losses are apart by far more than what is tolerated."""
    checkpoint = record_resume.checkpoint(RECORD, "full")
    for slots in checkpoint["optimizer"]["state"].values():
        slots[slot] = np.zeros_like(slots[slot])
    losses = train(checkpoint)
    assert np.abs(losses - RECORD["full/losses"][SWITCH:]).max() > 1e-3


def test_the_step_is_traced_once_and_reuses_the_memory_of_what_it_replaces(monkeypatch):
    traces = []
    mse = example.mse
    monkeypatch.setattr(example, "mse", lambda *args: traces.append(args) or mse(*args))
    model, optimizer = example.resume(record_resume.checkpoint(RECORD, "full"), 10)
    before = jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))
    assert len(before) == 18  # four parameters with three slots each, two counts of steps
    assert int(optimizer.opt_state.count[...]) == SWITCH
    # No other test has 23 rows, so nothing is traced yet.
    for _ in range(3):
        example.train_step(model, optimizer, RECORD["x"][:23], RECORD["y"][:23])
    assert len(traces) == 1
    assert int(optimizer.opt_state.count[...]) == SWITCH + 3
    assert all(leaf.is_deleted() for leaf in before)


def test_main_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    (version,) = (name for name in extras["compare"] if name.startswith("torch"))
    with pytest.raises(SystemExit, match=rf"pip install {version}.*\[compare\]"):
        example.main(["--checkpoint", str(tmp_path / "a.pt"), "--out", str(tmp_path / "a.png")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", ["0", "20", "-1"])
def test_main_refuses_a_switch_outside_the_run(switch, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(["--switch", switch])
    assert "--switch must be" in capsys.readouterr().err


def test_the_table_has_some_twenty_epochs(capsys):
    theirs = [1 / n for n in range(1, 51)]
    example.print_table(theirs, theirs[30:])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["epoch", "PyTorch", "resumed", "in", "JAX"]
    assert [int(row.split()[0]) for row in rows] == [*range(3, 51, 3)]
    for epoch, *losses in map(str.split, rows):
        assert losses == [f"{1 / int(epoch):.7f}"] * (1 + (int(epoch) > 30))


def assert_shows(result, switch, out, printed):
    theirs, ours = result
    difference = np.abs(np.subtract(theirs[switch:], ours)).max()
    assert difference < 1e-5
    assert_picture(out)
    *table, last = printed.out.splitlines()
    after = len(theirs) - switch
    assert [len(row.split()) for row in table[1:]] == [2] * switch + [3] * after
    assert last == f"Largest difference {difference:.1e}, curves in {out}"
    assert f"{after}/{after}" in printed.err  # the progress bar


def test_main_shows_how_near_the_losses_are(tmp_path, monkeypatch, capsys):
    """Of recorded runs, in the place of PyTorch and its checkpoint."""
    theirs, checkpoint = RECORD["plain/losses"].tolist(), record_resume.checkpoint(RECORD, "plain")
    here = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(example, "importlib", here)
    monkeypatch.setattr(example, "train_in_pytorch", lambda *args, **options: theirs)
    monkeypatch.setattr(example, "load", lambda file: checkpoint)
    monkeypatch.setattr(example, "train", lambda checkpoint, *_: train(checkpoint))
    file, out = tmp_path / "run.pt", tmp_path / "pictures" / "run.png"
    result = example.main(["--checkpoint", str(file), "--out", str(out)])
    assert [len(losses) for losses in result] == [20, 10]
    assert_shows(result, 10, out, capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("run", FLAGS)
def test_main(run, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    file, out = tmp_path / "new" / "run.pt", tmp_path / "pictures" / "run.png"
    flags = [*FLAGS[run], "--epochs", "8", "--switch", "5", "--seed", "3"]
    result = example.main([*flags, "--checkpoint", str(file), "--out", str(out)])
    theirs, ours = result
    assert [len(theirs), len(ours)] == [8, 3]
    assert theirs[-1] < theirs[0]
    steps = torch.load(file, weights_only=True)["optimizer"]["state"][0]["step"]
    assert int(steps) == 5
    printed = capsys.readouterr()
    assert_shows(result, 5, out, printed)
    assert "8/8" in printed.err  # PyTorch's progress bar
