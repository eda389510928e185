"""The paths of RMSProp, Adagrad, momentum and Adam in two dimensions, and the effect of a rotation.

    python examples/trajectory_2d.py

Descends f(x) = 0.1 x₁² + 2 x₂² from (-5, -2), an ellipse 20 times as steep across as along, then
the same function with its axes rotated by 45 degrees and shrunk, 0.1 (x₁ + x₂)² + 2 (x₁ - x₂)²,
from the corresponding point. RMSProp uses --learning-rate. Each of the others uses, on each
function, the rate 0.4 · 2^k, k from -6 to 5, with the lowest last loss; for RMSProp that would be
the default of 0.4 on both functions. Momentum is 0.5, because 20 steps are too few for 0.9. Prints
the last losses and RMSProp's last point, and draws the paths over contours; each contour is twice
as high as the one inside it. With --steps 100 RMSProp is last on both functions: its steps do not
shrink with the gradient, so it keeps crossing the minimum unless the rate falls.

RMSProp divides each coordinate of the gradient by its own number, in order to scale the
coordinates. Along the axes of the ellipse, scaling can turn it into a circle: the condition number
of the Hessian could fall from 20 to 1. After the rotation both coordinates are equally steep, and
no scaling brings the condition number below 20; what remains is close to gradient descent with a
changing rate. Momentum is unaffected by the rotation: with half the rate, because the axes have
shrunk, it takes the same path. The condition numbers are printed as they are and with the best
scaling, which for two coordinates is the one that makes the diagonal of the Hessian constant.

Sources: Hinton, Srivastava and Swersky, "Neural networks for machine learning", lecture 6e, 2012
(the rule); Zhang, Lipton, Li and Smola, "Dive into deep learning", section RMSProp (the function,
its start and the question of the rotation).
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
import numpy as np
from numpy.typing import NDArray
import optax

from drawing import picture
from rmsprop_jax import rmsprop

Points = NDArray[np.float64]
Loss = Callable[[jax.Array], jax.Array]
Rule = Callable[[jax.Array], optax.GradientTransformation]  # of a learning rate

RATES = np.array([0.4 * 2.0**k for k in range(-6, 6)])
OTHERS: dict[str, Rule] = {
    # The textbook rule: by default Optax's accumulator starts at 0.1.
    "Adagrad": lambda rate: optax.adagrad(rate, initial_accumulator_value=0, eps=1e-6),
    "momentum 0.5": lambda rate: optax.sgd(rate, momentum=0.5),
    "Adam": optax.adam,
}
STYLES = {
    "RMSProp": "C0o-",
    "Adagrad": "C2D-.",
    "momentum 0.5": "C3s:",
    "Adam": "C1^--",
}


def straight(x: jax.Array) -> jax.Array:
    return 0.1 * x[0] ** 2 + 2 * x[1] ** 2


def rotated(x: jax.Array) -> jax.Array:
    return 0.1 * (x[0] + x[1]) ** 2 + 2 * (x[0] - x[1]) ** 2


def paths(rule: Rule, loss: Loss, start: Sequence[float], rates: Points, steps: int) -> Points:
    """The points, including the start, of shape (rates, steps + 1, 2)."""
    first = jnp.array(start, float)

    def path(rate: jax.Array) -> jax.Array:
        tx = rule(rate)

        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        _, points = jax.lax.scan(step, (first, tx.init(first)), length=steps)
        return jnp.vstack([first, points])

    return np.asarray(jax.jit(jax.vmap(path))(rates))


class Run(NamedTuple):
    """The learning rate, the points, including the start, and the loss at the last one."""

    rate: float
    path: Points
    loss: float


class Descent(NamedTuple):
    """The runs on one function, and its Hessian's condition number, as is and with best scaling."""

    runs: dict[str, Run]
    condition: float
    scaled_condition: float


def descend(loss: Loss, start: Sequence[float], ours: Rule, rate: float, steps: int) -> Descent:
    runs = {}
    for name, rule in {"RMSProp": ours, **OTHERS}.items():
        rates = np.array([rate]) if name == "RMSProp" else RATES
        points = paths(rule, loss, start, rates, steps)
        losses = jax.vmap(loss)(jnp.asarray(points[:, -1])).tolist()
        best = int(np.nanargmin(losses))
        runs[name] = Run(float(rates[best]), points[best], losses[best])
    hessian = np.asarray(jax.hessian(loss)(jnp.array(start, float)))
    scale = 1 / np.sqrt(np.diag(hessian))
    scaled = scale[:, None] * hessian * scale
    return Descent(runs, float(np.linalg.cond(hessian)), float(np.linalg.cond(scaled)))


class Result(NamedTuple):
    """The descents on the function along the axes, and on the rotated one."""

    straight: Descent
    rotated: Descent


def draw_paths(axes: Axes, loss: Loss, runs: dict[str, Run]) -> None:
    points = np.concatenate([run.path for run in runs.values()])
    (left, bottom), (right, top) = points.min(axis=0) - 0.5, points.max(axis=0) + 0.5
    x1, x2 = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    heights = np.asarray(loss(jnp.stack([x1, x2])))
    axes.contour(x1, x2, heights, levels=2.0 ** np.arange(-4, 9), colors="0.85", linewidths=0.8)
    for name, run in runs.items():
        label, above = f"{name}, η = {run.rate:g}", 3 if name == "RMSProp" else 2
        axes.plot(*run.path.T, STYLES[name], label=label, markersize=4, linewidth=1.2, zorder=above)
    axes.plot(0, 0, "k+", markersize=14)
    axes.set(xlabel="x₁", ylabel="x₂", aspect="equal")
    axes.grid(visible=False)
    axes.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none")


def draw(result: Result, out: Path) -> None:
    with picture(out, height=4) as figure:
        left, right = figure.subplots(1, 2)
        draw_paths(left, straight, result.straight.runs)
        left.set_title("0.1 x₁² + 2 x₂²")
        draw_paths(right, rotated, result.rotated.runs)
        right.set_title("0.1 (x₁ + x₂)² + 2 (x₁ - x₂)²")


def print_table(result: Result, steps: int) -> None:
    print(f"{'':22}{'straight':>9}{'rotated':>21}")
    print(f"{f'after {steps} steps':18}   rate       loss" + "     rate       loss")
    for name in result.straight.runs:
        runs = (descent.runs[name] for descent in result)
        print(f"{name:18}" + "  ".join(f"{run.rate:7g}  {run.loss:9.2e}" for run in runs))
    conditions = (descent.condition for descent in result)
    print(f"{'condition number':18}" + "  ".join(f"{number:18.1f}" for number in conditions))
    conditions = (descent.scaled_condition for descent in result)
    print(f"{'  best scaling':18}" + "  ".join(f"{number:18.1f}" for number in conditions))


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.4)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--eps", type=float, default=1e-6)
    parser.add_argument("--out", type=Path, default=Path("out/trajectory_2d.png"))
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 < args.learning_rate < np.inf:
        parser.error("--steps must be at least 1, --learning-rate positive and finite")

    def ours(rate: jax.Array) -> optax.GradientTransformation:
        return rmsprop(rate, args.decay, args.eps)

    with jax.enable_x64(True):  # so that rounding does not affect small losses
        result = Result(
            descend(straight, (-5, -2), ours, args.learning_rate, args.steps),
            descend(rotated, (-3.5, -1.5), ours, args.learning_rate, args.steps),
        )
        draw(result, args.out)
    print_table(result, args.steps)
    x1, x2 = result.straight.runs["RMSProp"].path[-1]
    print(f"RMSProp's last point: x1 = {x1:z.6f}, x2 = {x2:z.6f}, picture in {args.out}")
    return result


if __name__ == "__main__":
    main()
