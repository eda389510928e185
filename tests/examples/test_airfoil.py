"""The examples on airfoil data, compared with float64 NumPy loops and manual derivatives."""

import contextlib
import functools
import io
import os
from pathlib import Path
import re
import runpy

import jax
import numpy as np
import pytest

import adagrad_vs_rmsprop
import adaptive_decay
import airfoil
from helpers import like_airfoil
from pictures import assert_picture

EXAMPLES = {
    airfoil: [],
    adaptive_decay: ["--epochs", "1", "--batch", "60", "--seeds", "4"],
    adagrad_vs_rmsprop: ["--epochs", "2", "--batch", "20", "--seeds", "2"],
}


def find_data(folder, monkeypatch):
    """The real file where there is one, else one like it: of 203 rows."""
    if not os.environ.get("RMSPROP_JAX_DATA"):
        like_airfoil(folder, monkeypatch)


@pytest.fixture
def data(tmp_path, monkeypatch):
    find_data(tmp_path, monkeypatch)


@pytest.mark.parametrize("flag", [["--epochs", "0"], ["--batch", "0"], ["--batch", "1503"]])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_main_refuses_what_it_cannot_do(example, flag, data, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    with pytest.raises(SystemExit, match="2"):
        example.main([*flag, "--out", str(out)])
    assert flag[0] in capsys.readouterr().err
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("example", "flag"),
    [
        (airfoil, ["--every", "0"]),
        (adaptive_decay, ["--seeds", "2"]),
        (adaptive_decay, ["--seeds", "5"]),
        (adagrad_vs_rmsprop, ["--seeds", "0"]),
    ],
)
def test_main_refuses_numbers_of_its_own_flags(example, flag, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(flag)
    assert flag[0] in capsys.readouterr().err


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_without_its_data_an_example_says_so_in_a_line(example, tmp_path, monkeypatch):
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", [example.__file__])
    with pytest.raises(SystemExit, match=rf"^{Path(example.__file__).name}: airfoil: no file"):
        runpy.run_path(example.__file__, run_name="__main__")


# Linear regression.


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """What main returns, the arguments of its trainings, what it prints and what it draws."""
    folder = tmp_path_factory.mktemp("regression")
    calls, printed, out = [], io.StringIO(), folder / "new" / "curves.png"
    train = airfoil.train
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        find_data(folder, monkeypatch)
        monkeypatch.setattr(airfoil, "train", lambda *args: calls.append(args) or train(*args))
        result = airfoil.main(["--every", "7", "--out", str(out)])
    return result, calls, printed.getvalue().splitlines(), out


def regression_by_hand(params, x, y, batches, every, eps_inside, eps_outside):
    w, b = np.asarray(params["w"], float), float(params["b"])
    x, y = x.astype(float), y.astype(float)
    p, s = np.append(w, b), np.zeros(6)
    columns = np.column_stack([x, np.ones(len(x))])
    losses = [np.mean((columns @ p - y) ** 2) / 2]
    for count, rows in enumerate(batches, 1):
        g = columns[rows].T @ (columns[rows] @ p - y[rows]) / len(rows)
        s = 0.9 * s + 0.1 * g * g
        p = p - 0.01 * g / (np.sqrt(s + eps_inside) + eps_outside)
        if count % every == 0 or count == len(batches):
            losses.append(np.mean((columns @ p - y) ** 2) / 2)
    return losses


def test_each_way_is_the_rule_with_its_eps(regression):
    result, calls, *_ = regression
    eps = {
        "from scratch": (1e-6, 0),
        "rmsprop": (1e-6, 0),
        "pytorch": (0, 1e-8),
        "keras": (1e-7, 0),
    }
    assert list(result.losses) == list(eps)
    for (name, losses), call in zip(result.losses.items(), calls, strict=True):
        want = regression_by_hand(*call[1:], *eps[name])
        # What float32 leaves of 300 steps; on the real data the ways are 3e-5 apart.
        np.testing.assert_allclose(losses, want, rtol=0, atol=1e-6, err_msg=name)
        assert len(result.epochs) == len(want)
    first, ours = (result.losses[name] for name in ("from scratch", "rmsprop"))
    np.testing.assert_allclose(ours, first, rtol=0, atol=1e-6)
    assert result.epochs[0] == 0
    assert result.epochs[-1] == 2


def test_no_loss_is_below_that_of_the_normal_equations(regression):
    result, calls, *_ = regression
    x, y = (a.astype(float) for a in calls[0][2:4])
    columns = np.column_stack([x, np.ones(len(x))])
    line = np.linalg.solve(columns.T @ columns, columns.T @ y)
    floor = np.mean((columns @ line - y) ** 2) / 2
    np.testing.assert_allclose(result.floor, floor, rtol=1e-9)
    assert all(loss > floor for losses in result.losses.values() for loss in losses)


def test_regression_prints_what_it_returns(regression):
    result, _, lines, out = regression
    first = result.losses["from scratch"]
    assert lines[1].split() == ["from", "scratch", f"{first[-1]:.5f}"]
    for line, name in zip(lines[2:5], ["rmsprop", "pytorch", "keras"], strict=True):
        away = max(abs(a - b) for a, b in zip(result.losses[name], first, strict=True))
        assert line.split() == [name, f"{result.losses[name][-1]:.5f}", f"{away:.1e}"]
    assert lines[5].split() == ["least", "squares", f"{result.floor:.5f}"]
    assert_picture(out)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RMSPROP_JAX_DATA"), reason="of the real data")
def test_the_last_loss_on_the_real_data_is_near_that_of_least_squares(tmp_path):
    result = airfoil.main(["--out", str(tmp_path / "curves.png")])
    assert result.floor == pytest.approx(0.24169, abs=1e-5)
    for losses in result.losses.values():
        assert 0.241 <= losses[-1] <= 0.249


# The network of the two other examples.


def loss_and_grads(params, x, y):
    """Of the parameters b1, b2, w1 and w2, the order of JAX's leaves."""
    b1, b2, w1, w2 = params
    hidden = np.maximum(x @ w1 + b1, 0)
    error = hidden @ w2 + b2 - y
    back = 2 * error / error.size
    back1 = np.outer(back, w2) * (hidden > 0)
    return np.mean(error**2), [back1.sum(0), back.sum(), x.T @ back1, hidden.T @ back]


SEEDS = (3, 5)
BATCHES = np.random.default_rng(2).integers(40, size=(2, 12, 4))  # of each seed


@functools.cache
def networks(example):
    """Of all seeds at once, as main makes them: to compile random numbers takes seconds."""
    of_seeds = jax.vmap(lambda seed: example.network(jax.random.key(seed)))
    return jax.device_get(of_seeds(np.array(SEEDS)))


def network(example, seed):
    return jax.tree.map(lambda leaf: leaf[SEEDS.index(seed)], networks(example))


def start(example, seed):
    return [np.asarray(leaf, float) for leaf in jax.tree.leaves(network(example, seed))]


def rows_like_data():
    rng = np.random.default_rng(1)
    return rng.standard_normal((40, 5), dtype=np.float32), rng.standard_normal(40, dtype=np.float32)


def late_loss_by_hand(decays, rate, seed, batches, bias_correction):
    x, y = (a.astype(float) for a in rows_like_data())
    params, s, weight, losses = start(adaptive_decay, seed), [0.0] * 4, 0.0, []
    for decay, rows in zip(decays, batches, strict=True):
        loss, grads = loss_and_grads(params, x[rows], y[rows])
        losses.append(loss)
        weight = decay * weight + 1 - decay
        for i, g in enumerate(grads):
            s[i] = decay * s[i] + (1 - decay) * g * g
            mean = s[i] / weight if bias_correction else s[i]
            params[i] = params[i] - rate * g / np.sqrt(mean + 1e-8)
    return np.mean(losses[9:])


@pytest.mark.slow
@pytest.mark.parametrize("bias_correction", [False, True])
def test_every_decay_rate_and_seed_trains_as_if_alone(bias_correction):
    t = np.arange(1, 13)
    decays = np.array([np.full(12, 0.9), np.full(12, 0.999), 1 - 1 / t, np.linspace(1, 0.5, 12)])
    decays[3, 0] = 0.99
    losses = adaptive_decay.final_losses(
        decays.astype(np.float32), SEEDS, BATCHES, *rows_like_data(), bias_correction
    )
    rates = adaptive_decay.RATES
    assert losses.shape == (4, len(rates), 2)
    want = [
        [
            [
                late_loss_by_hand(decay, rate, seed, batches, bias_correction)
                for seed, batches in zip(SEEDS, BATCHES, strict=True)
            ]
            for rate in rates
        ]
        for decay in decays
    ]
    # Losses of some 1, in float32, where 1 - .999 has an error of 1e-5 of itself.
    np.testing.assert_allclose(losses, want, rtol=1e-4)


def test_the_schedules_are_what_their_names_say():
    schedules = adaptive_decay.schedules(2000)
    assert all(len(decay) == 2000 for decay in schedules.values())
    assert all(0 <= d <= 1 for decay in schedules.values() for d in decay)
    mean, power, rising, falling = schedules.values()
    # Under the first, s is the mean of all squares until the decay has risen to .999.
    squares, s = np.random.default_rng(0).random(1000), 0.0
    for decay, square in zip(mean, squares, strict=False):
        s = decay * s + (1 - decay) * square
    assert s == pytest.approx(squares.mean())
    assert mean[-1] == 0.999
    assert power[:2] == pytest.approx([0, 1 - 2**-0.8])
    assert rising[[0, 1000]] == pytest.approx([0.9, 0.99])
    assert falling[[0, 1000]] == pytest.approx([0.999, 0.99])
    assert max(rising) <= 0.999
    assert min(falling) >= 0.9


def test_what_is_chosen_on_one_half_of_the_seeds_is_reported_on_the_other():
    losses = np.full((2, len(adaptive_decay.RATES), 4), 9.0)
    losses[1, 2] = [1, 2, 7, 8]
    losses[0, 1] = [3, 3, 0, 0]  # better, but on seeds that do not choose
    one = adaptive_decay.best(["a", "b"], losses)
    assert one == adaptive_decay.Best("b", adaptive_decay.RATES[2], [7, 8])
    other = one._replace(losses=[4, 7])
    assert adaptive_decay.difference(one, other) == (2, 1)  # of 3 and 1


def test_adaptive_decay_prints_what_it_returns(data, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    result = adaptive_decay.main([*EXAMPLES[adaptive_decay], "--out", str(out)])
    assert_picture(out)
    assert result.losses.shape == (2, 12, 4, 4)
    assert (np.ptp(result.losses[0, :8], axis=0) > 0).all()  # uncorrected, the decay matters
    # The plain mean needs no correction: the sum of its weights is 1.
    plain = result.losses[:, result.names.index("1 - 1/t up to .999")]
    np.testing.assert_allclose(plain[0], plain[1], rtol=1e-4)
    printed = capsys.readouterr().out
    for losses, compared in zip(result.losses, result.compared, strict=True):
        for name, of_rates in zip(result.names, losses, strict=True):
            cells = [f"{np.mean(of):.4f} ± {np.std(of, ddof=1):.4f}" for of in of_rates]
            assert re.search(rf"^{re.escape(name)} +{' +'.join(cells)}$", printed, re.MULTILINE)
        first, *others = compared
        assert [one.name for one in others] == ["0.9", *result.names[8:]]
        rows = [re.escape(f"{first.name:18}  {first.rate:17g}  {np.mean(first.losses):.4f}")]
        for one in others:
            away = np.subtract(one.losses, first.losses)
            figures = f"{away.mean():+.4f} ± {away.std(ddof=1) / 2**0.5:.4f}"
            row = f"{one.name:18}  {one.rate:17g}  {np.mean(one.losses):.4f}  {figures}"
            rows.append(re.escape(row))
        assert re.search("\n".join(rows), printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adagrad", "rmsprop"])
def test_the_effective_rate_is_the_factor_of_the_gradient(name):
    x, y = rows_like_data()
    batches = BATCHES[0].reshape(2, 6, 4)
    method = adagrad_vs_rmsprop.METHODS[name]
    params = network(adagrad_vs_rmsprop, 3)
    train = jax.jit(functools.partial(adagrad_vs_rmsprop.train, method, 1e-6, x, y))
    trained = train(0.05, params, batches)
    x, y = x.astype(float), y.astype(float)
    params, s = start(adagrad_vs_rmsprop, 3), [0.0] * 4
    losses, effective = [], []
    for epoch in batches:
        for rows in epoch:
            _, grads = loss_and_grads(params, x[rows], y[rows])
            for i, g in enumerate(grads):
                s[i] = s[i] + g * g if name == "adagrad" else 0.9 * s[i] + 0.1 * g * g
                params[i] = params[i] - 0.05 * g / np.sqrt(s[i] + 1e-6)
            rates = np.concatenate([np.ravel(0.05 / np.sqrt(leaf + 1e-6)) for leaf in s])
            effective.append(rates)
        losses.append(loss_and_grads(params, x, y)[0])
    np.testing.assert_allclose(trained.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(trained.rates.reshape(12, -1), effective, rtol=1e-3)


def test_adagrad_vs_rmsprop_prints_what_it_returns(data, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    runs = adagrad_vs_rmsprop.main([*EXAMPLES[adagrad_vs_rmsprop], "--out", str(out)])
    assert_picture(out)
    lines = capsys.readouterr().out.splitlines()
    steps = len(runs["adagrad"].effective)
    at = [1, steps // 2, steps]
    assert lines[6].split() == [*map(str, at), "chosen", "loss"]
    assert lines[10].startswith(f"From step {steps // 2} on ")
    for i, (name, run) in enumerate(runs.items()):
        assert run.rate == adagrad_vs_rmsprop.RATES[np.argmin(run.sweep)]
        assert lines[2 + i].split() == [name, *(f"{loss:.4f}" for loss in run.sweep)]
        medians = [f"{run.effective[step - 1, 1]:.4f}" for step in at]
        assert lines[7 + i].split() == [name, *medians, f"{run.rate:g}", f"{run.loss:.4f}"]
        assert run.loss == pytest.approx(run.losses[-1])  # a quarter of two epochs is the last
        later = run.effective[steps // 2 - 1 :, 1]  # from the end of the first of two epochs
        figures = [f"{later.min():.4f}", f"{later.max():.4f}", f"{run.at_limit:.1%}"]
        assert lines[11 + i].split() == [name, *figures]
        assert len({*run.sweep}) == len(run.sweep)  # the learning rate matters
    # A sum of squares never falls, so no effective rate of Adagrad's ever rises.
    assert (np.diff(runs["adagrad"].effective, axis=0) <= 0).all()
    assert (np.diff(runs["rmsprop"].effective[:, 1]) > 0).any()


def test_parameters_without_a_gradient_reach_the_limit_of_the_rate(data, tmp_path):
    """Against so large an eps no square counts."""
    flags = [*EXAMPLES[adagrad_vs_rmsprop], "--eps", "1e6", "--out", str(tmp_path / "curves.png")]
    for run in adagrad_vs_rmsprop.main(flags).values():
        assert run.at_limit == 1
        np.testing.assert_allclose(run.effective, run.rate / 1e3, rtol=1e-2)
