"""The examples on decays and trajectories, compared with float64 NumPy loops and identities."""

import contextlib
import io

import numpy as np
import pytest

import decay_weights
import extreme_decay
from pictures import assert_picture
import trajectory_2d

EXAMPLES = {"decay_weights": decay_weights, "trajectory": trajectory_2d, "extreme": extreme_decay}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What an example returns, prints and draws with its default flags; each runs once."""
    done = {}

    def run(name):
        if name not in done:
            out = tmp_path_factory.mktemp(name) / "new" / "picture.png"
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                result = EXAMPLES[name].main(["--out", str(out)])
            done[name] = result, printed.getvalue().splitlines(), out
        return done[name]

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_picture_is_drawn_and_named_last(name, ran):
    _, lines, out = ran(name)
    assert_picture(out)
    assert lines[-1].endswith(f"picture in {out}")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("decay_weights", ["--decay", "1"]),
        ("decay_weights", ["--decay", "0.9", "-0.1"]),
        ("decay_weights", ["--decay", "nan"]),
        ("decay_weights", ["--steps", "19"]),
        ("trajectory", ["--steps", "0"]),
        ("trajectory", ["--learning-rate", "nan"]),
        ("extreme", ["--steps", "0"]),
        ("extreme", ["--learning-rate", "0"]),
        ("extreme", ["--eps", "0"]),
        ("extreme", ["--eps", "nan"]),
    ],
)
def test_flags_are_refused(name, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        EXAMPLES[name].main([*flags, "--out", str(tmp_path / "picture.png")])
    assert flags[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# decay_weights


def test_a_running_mean_is_the_sum_of_squares_with_the_measured_weights(ran):
    results, _, _ = ran("decay_weights")
    assert list(results) == [0.95, 0.9, 0.8, 0.7]
    gradients = np.random.default_rng(0).standard_normal(40)
    for decay, result in results.items():
        assert len(result.weights) == 40
        s = 0.0
        for g in gradients:
            s = decay * s + (1 - decay) * g**2
        # Some float32 roundings.
        np.testing.assert_allclose(result.weights[::-1] @ gradients**2, s, rtol=3e-6)


def test_the_memory_is_the_mean_age_of_the_weights(tmp_path):
    flags = ["--decay", "0.9", "0.5", "0", "--steps", "300", "--out", str(tmp_path / "p.png")]
    for result in decay_weights.main(flags).values():
        mean_age = np.arange(1, 301) @ result.weights.astype(float)
        np.testing.assert_allclose(mean_age, result.memory, rtol=3e-6)


def test_the_shares_of_the_memory(ran):
    results, lines, _ = ran("decay_weights")
    assert [result.within for result in results.values()] == [20, 10, 5, 3]
    rows = zip(lines[1:-1], results.items(), strict=True)
    for line, (decay, result) in rows:
        np.testing.assert_allclose(result.share, 1 - decay**result.within, rtol=3e-6)
        memory, share = f"{result.memory:.1f}", f"{result.share:.1%}"
        assert line.split() == [str(decay), memory, "steps", "newest", f"{result.within}:", share]


# trajectory_2d


def straight_gradient(x):
    return np.array([0.2 * x[0], 4 * x[1]])


def rotated_gradient(x):
    u, v = x[0] + x[1], x[0] - x[1]
    return np.array([0.2 * u + 4 * v, 0.2 * u - 4 * v])


def by_hand(name, gradient, x, rate, steps=20):
    """The path of a rule as the textbooks have it."""
    x = np.array(x, float)
    s, m, path = np.zeros(2), np.zeros(2), [x]
    for t in range(1, steps + 1):
        g = gradient(x)
        if name == "RMSProp":
            s = 0.9 * s + 0.1 * g**2
            step = g / np.sqrt(s + 1e-6)
        elif name == "Adagrad":
            s = s + g**2
            step = g / np.sqrt(s + 1e-6)
        elif name == "momentum 0.5":
            step = m = 0.5 * m + g
        else:
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            step = m / (1 - 0.9**t) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
        x = x - rate * step
        path.append(x)
    return np.array(path)


FUNCTIONS = {
    "straight": (straight_gradient, (-5, -2)),
    "rotated": (rotated_gradient, (-3.5, -1.5)),
}
RULES = ["RMSProp", "Adagrad", "momentum 0.5", "Adam"]


def height(function, x):
    """Both are homogeneous of degree 2: by Euler, half the gradient along x."""
    return FUNCTIONS[function][0](x) @ x / 2


def test_the_last_point(ran):
    result, lines, _ = ran("trajectory")
    x1, x2 = result.straight.runs["RMSProp"].path[-1]
    expected = by_hand("RMSProp", straight_gradient, (-5, -2), 0.4)[-1]
    np.testing.assert_allclose([x1, x2], expected, rtol=0, atol=1e-12)
    assert f"{x1:.6f}" == "-0.010599"
    assert abs(x2) < 5e-7
    assert lines[-1].startswith("RMSProp's last point: x1 = -0.010599, x2 = 0.000000, ")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_a_path_is_the_rule_by_hand_at_the_best_of_the_rates(rule, function, ran):
    result, _, _ = ran("trajectory")
    run = getattr(result, function).runs[rule]
    path = by_hand(rule, *FUNCTIONS[function], run.rate)
    # Where a rule jumps over the minimum, roundings grow.
    np.testing.assert_allclose(run.path, path, rtol=0, atol=1e-9)
    np.testing.assert_allclose(run.loss, height(function, path[-1]), rtol=1e-6, atol=1e-18)
    rates = [0.4 * 2.0**k for k in range(-6, 6)]
    with np.errstate(over="ignore", invalid="ignore"):
        losses = [height(function, by_hand(rule, *FUNCTIONS[function], r)[-1]) for r in rates]
    assert run.rate == rates[np.nanargmin(losses)]


def test_momentum_does_not_see_the_rotation_and_the_others_do(ran):
    result, _, _ = ran("trajectory")
    turn = np.array([[1, 1], [1, -1]])
    for rule in RULES:
        run, turned = (descent.runs[rule] for descent in result)
        same = np.abs(turned.path @ turn - run.path).max() < 1e-12
        assert same == (rule == "momentum 0.5")
        assert same or turned.loss > 3 * run.loss


def test_no_scaling_of_the_coordinates_betters_the_condition_numbers(ran):
    result, _, _ = ran("trajectory")
    hessians = [np.diag([0.2, 4.0]), np.array([[4.2, -3.8], [-3.8, 4.2]])]
    for descent, hessian in zip(result, hessians, strict=True):
        assert descent.condition == pytest.approx(20)
        scales = [np.diag([1, ratio]) for ratio in np.geomspace(1e-3, 1e3, 2001)]
        best = min(np.linalg.cond(scale @ hessian @ scale) for scale in scales)
        assert descent.scaled_condition == pytest.approx(best, rel=0.01)
        assert descent.scaled_condition <= best * (1 + 1e-9)


@pytest.mark.slow
def test_after_100_steps_the_constant_rate_of_rmsprop_is_the_worst(tmp_path):
    result = trajectory_2d.main(["--steps", "100", "--out", str(tmp_path / "p.png")])
    for descent in result:
        assert max(RULES, key=lambda rule: descent.runs[rule].loss) == "RMSProp"


def test_the_table_of_losses(ran):
    result, lines, _ = ran("trajectory")
    for rule, line in zip(RULES, lines[2:6], strict=True):
        runs = [descent.runs[rule] for descent in result]
        cells = [cell for run in runs for cell in (f"{run.rate:g}", f"{run.loss:.2e}")]
        assert line.removeprefix(rule).split() == cells
    assert lines[6].split() == ["condition", "number", "20.0", "20.0"]
    assert lines[7].split() == ["best", "scaling", "1.0", "20.0"]


# extreme_decay


def test_the_runs_are_the_rule_by_hand(ran):
    runs, _, _ = ran("extreme")
    assert [run.decay for run in runs] == [1, 1, 1, 0, 0.9]
    for run in runs:
        x, s, path = -2.9, run.initial_scale, [-2.9]
        for _ in range(20):
            s = run.decay * s + (1 - run.decay) * x**2
            x = x - 0.3 * x / np.sqrt(s + run.eps)
            path.append(x)
        np.testing.assert_allclose(run.x, path, rtol=1e-9, atol=1e-12)


def test_at_1_it_is_gradient_descent(ran):
    runs, _, _ = ran("extreme")
    rates = [0.3 / np.sqrt(1e-6), 0.3 / np.sqrt(0.04), 0.3 / np.sqrt(1 + 1e-6)]
    for run, rate in zip(runs[:3], rates, strict=True):
        closed_form = -2.9 * (1 - rate) ** np.arange(21)
        np.testing.assert_allclose(run.x, closed_form, rtol=1e-12)
        np.testing.assert_allclose(run.simpler, closed_form, rtol=1e-12)
        assert run.difference < 1e-14
        assert (abs(run.x[-1]) > 2.9) == (rate > 2)


def test_at_0_it_is_sign_descent_that_ends_in_jumps_of_the_learning_rate(ran):
    runs, lines, _ = ran("extreme")
    x = np.array(runs[3].x)
    signs = -2.9 + 0.3 * np.arange(11)
    np.testing.assert_allclose(runs[3].simpler[:11], signs, rtol=0, atol=1e-12)
    # The root of g² + eps is above |g| by eps / 2 g², at the smallest |g| of .1 by 5e-5.
    np.testing.assert_allclose(np.abs(np.diff(x)), 0.3, rtol=1e-4)
    assert (x[10:] > 0).tolist() == [True, False] * 5 + [True]
    np.testing.assert_allclose(runs[3].simpler, x, rtol=0, atol=2e-4)
    assert 0 < runs[3].difference < 1e-3
    before, last = x[-2:]
    assert lines[-1].startswith(f"The last step at decay 0 is from {before:.4f} to {last:.4f}, ")


def test_the_table_of_extremes(ran):
    runs, lines, _ = ran("extreme")
    steps = ["300 g", "1.5 g", "0.3 g", "0.3 sign(g)", "0.3 g / root of s"]
    assert [run.step for run in runs] == steps
    for run, line in zip(runs, lines[1:-1], strict=True):
        rule = [f"{run.decay:g}", f"{run.initial_scale:g}", f"{run.eps:g}", *run.step.split()]
        difference = [] if run.difference is None else [f"{run.difference:.0e}"]
        assert line.split() == [*rule, f"{run.x[-1]:.3e}", *difference]


def test_what_grows_beyond_all_numbers(tmp_path):
    diverging = extreme_decay.main(["--steps", "150", "--out", str(tmp_path / "p.png")])[0]
    assert np.isfinite(diverging.x).all()
    assert not np.isfinite(diverging.simpler[-1])
    assert diverging.difference < 1e-13
