"""SimpleNet, trained by the examples' code, compared with PyTorch, NumPy and its linen version."""

import functools
import os
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import like_airfoil
from pictures import assert_picture
import real_data
import record_simplenet
from rmsprop_jax import rmsprop
import simplenet
import simplenet_linen

RECORD = record_simplenet.load()
RUNS = {"recorded": lambda: RECORD}
if record_simplenet.TORCH_IS_HERE:
    RUNS["live"] = lambda: record_simplenet.run(RECORD)
LAYERS = ("fc1", "fc2")


def initial_weights():
    """PyTorch's initial weights, in the layout and under the names of both our models."""
    return {
        layer: {
            "kernel": jnp.array(RECORD[f"initial/{layer}.weight"].T),
            "bias": jnp.array(RECORD[f"initial/{layer}.bias"]),
        }
        for layer in LAYERS
    }


@pytest.fixture
def model(monkeypatch):
    """What main will train: from the recorded weights, on the recorded data."""
    model = simplenet.SimpleNet(10, nnx.Rngs(0))
    nnx.update(model, initial_weights())
    monkeypatch.setattr(simplenet, "SimpleNet", lambda inputs, rngs: model)
    monkeypatch.setattr(simplenet, "random_samples", lambda seed: (RECORD["x"], RECORD["y"]))
    return model


@pytest.mark.parametrize("run", RUNS)
def test_the_example_trains_as_pytorch_does(run, model, tmp_path):
    torch = RUNS[run]()
    losses, _ = simplenet.main(["--out", str(tmp_path / "loss.png")])
    np.testing.assert_allclose(losses, torch["losses"], rtol=0, atol=1e-5)
    for layer in LAYERS:
        ours = getattr(model, layer)
        # 5e-5 of the weight and of the learning rate: what float32 leaves of a sum of steps.
        close = functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=5e-7)
        close(ours.kernel[...].T, torch[f"final/{layer}.weight"])
        close(ours.bias[...], torch[f"final/{layer}.bias"])


def by_hand(eps_in_sqrt):
    """The losses from the recorded weights in float64, its derivatives written out."""
    x, y = RECORD["x"].astype(float), RECORD["y"].astype(float)
    w1, b1, w2, b2 = (
        RECORD[f"initial/{layer}.{name}"].T.astype(float)
        for layer in LAYERS
        for name in ("weight", "bias")
    )
    params = [w1, b1, w2, b2]
    averages = [0.0] * 4
    losses = []
    for _ in range(10):
        w1, b1, w2, b2 = params
        hidden = np.maximum(x @ w1 + b1, 0)
        error = hidden @ w2 + b2 - y
        losses.append(np.mean(error**2))
        back2 = 2 * error / error.size
        back1 = (back2 @ w2.T) * (hidden > 0)
        grads = [x.T @ back1, back1.sum(0), hidden.T @ back2, back2.sum(0)]
        for i, g in enumerate(grads):
            averages[i] = 0.9 * averages[i] + 0.1 * g**2
            if eps_in_sqrt:
                params[i] = params[i] - 0.01 * g / np.sqrt(averages[i] + 1e-8)
            else:
                params[i] = params[i] - 0.01 * g / (np.sqrt(averages[i]) + 1e-8)
    return np.array(losses)


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_eps_lies_outside_the_root_unless_the_flag_puts_it_inside(eps_in_sqrt, model, tmp_path):
    flags = ["--eps-in-sqrt"] if eps_in_sqrt else []
    losses, _ = simplenet.main([*flags, "--out", str(tmp_path / "loss.png")])
    np.testing.assert_allclose(losses, by_hand(eps_in_sqrt), rtol=0, atol=1e-6)
    # The two are apart by more than what is tolerated.
    assert np.abs(losses - by_hand(not eps_in_sqrt)).max() > 1e-5


@pytest.mark.slow
def test_linen_trains_as_nnx_does(model, tmp_path):
    losses, _ = simplenet.main(["--out", str(tmp_path / "loss.png")])
    state = simplenet_linen.create(initial_weights(), 0.01)
    linen = simplenet_linen.train(state, RECORD["x"], RECORD["y"], 10)
    np.testing.assert_allclose(linen, losses, rtol=0, atol=1e-6)


def assert_prints(out, epochs, losses, last):
    """One line an epoch with its loss, as `Epoch [1/10], Loss: 0.8619`, then one last line."""
    lines = out.splitlines()
    assert lines[:-1] == [
        f"Epoch [{epoch}/{epochs}], Loss: {loss:.4f}" for epoch, loss in enumerate(losses, 1)
    ]
    assert len(losses) == epochs
    assert re.fullmatch(last, lines[-1])


def test_main_on_random_samples(tmp_path, capsys):
    out = tmp_path / "new" / "loss.png"
    losses, test_losses = simplenet.main(["--epochs", "4", "--out", str(out)])
    assert (np.diff(losses) < 0).all()
    assert test_losses == []
    assert_picture(out)
    last = rf"Loss {losses[0]:.4f} -> {losses[-1]:.4f}, curve in {re.escape(str(out))}"
    assert_prints(capsys.readouterr().out, 4, losses, last)


@pytest.fixture
def airfoil(tmp_path, monkeypatch):
    """How many rows are held out: of the real file where there is one, else of one like it."""
    if os.environ.get("RMSPROP_JAX_DATA"):
        return 301
    like_airfoil(tmp_path, monkeypatch)
    return 41


def linear_loss(x, y, x_test, y_test):
    """By the normal equations, with an intercept, in float64."""
    x, y, x_test, y_test = (np.asarray(a, float) for a in (x, y, x_test, y_test))
    ones = [np.ones((len(a), 1)) for a in (x, x_test)]
    x, x_test = np.hstack([x, ones[0]]), np.hstack([x_test, ones[1]])
    return np.mean((x_test @ np.linalg.solve(x.T @ x, x.T @ y) - y_test) ** 2)


@pytest.mark.slow
def test_main_on_airfoil(airfoil, tmp_path, capsys):
    out = tmp_path / "loss.png"
    result = simplenet.main(["--data", "airfoil", "--epochs", "8", "--out", str(out)])
    losses, test_loss = result.losses, result.test_losses[-1]
    assert losses[-1] < losses[0]
    assert len(result.test_losses) == 8
    line = linear_loss(*simplenet.airfoil(seed=0))
    assert test_loss < line
    assert_picture(out)
    printed = capsys.readouterr()
    last = rf"Test loss {test_loss:.4f} on {airfoil} held-out rows, {line:.4f} for a linear model"
    last += f", curves in {re.escape(str(out))}"
    assert_prints(printed.out, 8, losses, last)
    assert "8/8" in printed.err  # the progress bar


def test_airfoil_is_split_and_in_units_of_the_training_deviations(airfoil):
    x, y, x_test, y_test = simplenet.airfoil(seed=0)
    assert len(x_test) == len(y_test) == airfoil
    train = np.hstack([x, y])
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-4)
    # Every measurement is in one part, once, and in both on one scale: undone, they are the file.
    rows = real_data.airfoil()
    both = np.vstack([train, np.hstack([x_test, y_test])])
    scale, shift = np.polyfit(np.sort(both[:, 5]), np.sort(rows[:, 5]), 1)
    np.testing.assert_allclose(np.sort(both[:, 5] * scale + shift), np.sort(rows[:, 5]), rtol=1e-5)


@pytest.mark.parametrize(
    "flags", [["--epochs", "0"], ["--batch", "0"], ["--batch", "101"], ["--data", "x"]]
)
def test_main_refuses_what_it_cannot_do(flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        simplenet.main([*flags, "--out", str(tmp_path / "loss.png")])
    assert flags[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_step_compiles_once_and_reuses_the_memory_of_what_it_replaces(monkeypatch):
    traces = []
    mse = simplenet.mse
    monkeypatch.setattr(simplenet, "mse", lambda *args: traces.append(args) or mse(*args))
    model = simplenet.SimpleNet(3, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(0.01), wrt=nnx.Param)
    before = jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))
    assert len(before) == 10  # four parameters, their averages, two counts of steps
    # No other test has this shape, so nothing is compiled yet; two of the 23 rows sit out.
    x = np.random.default_rng(0).standard_normal((23, 4), dtype=np.float32)
    simplenet.train(model, optimizer, x[:, 1:], x[:, :1], epochs=3, batch=7, seed=0)
    assert len(traces) == 1
    assert int(optimizer.step[...]) == 9
    assert all(leaf.is_deleted() for leaf in before)


def test_the_linen_step_compiles_once_and_reuses_the_memory_of_what_it_replaces():
    simplenet_linen.train_step.clear_cache()
    state = simplenet_linen.create(initial_weights(), 0.01)
    before = jax.tree.leaves(state)
    assert len(before) == 10
    simplenet_linen.train(state, RECORD["x"], RECORD["y"], 3)
    assert simplenet_linen.train_step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in before)


def test_main_in_linen(capsys):
    losses = simplenet_linen.main(["--epochs", "3"])
    assert (np.diff(losses) < 0).all()
    last = rf"Loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    assert_prints(capsys.readouterr().out, 3, losses, last)
    with pytest.raises(SystemExit, match="2"):
        simplenet_linen.main(["--epochs", "0"])
