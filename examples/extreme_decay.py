"""RMSProp at the extremes of its decay: 1 never learns a scale, 0 keeps only the sign.

    python examples/extreme_decay.py

Descends f(x) = x² / 2, whose gradient is x, from -2.9, by s <- γ s + (1 - γ) g² and
x <- x - η g / √(s + ε).

At γ = 1, s keeps its initial value, and the rule is gradient descent. From s = 0 its rate is
η / √ε, which for ε = 1e-6 is a thousand times the learning rate. On this function gradient descent
diverges at rates above 2, so it diverges unless ε is large. From s = 1, where TensorFlow 1 starts,
the rate is η / √(1 + ε), and gradients never influence it.

At γ = 0, s is the square of the newest gradient, and the step is η sign(g), however steep the
slope, until g is as small as √ε. x approaches the minimum at a constant pace, then jumps back and
forth across it, by η each time.

Prints the step of each run and where it leads, with the largest difference from gradient descent or
sign descent, divided by |x| or by η, whichever is larger; at γ = 0 it is caused by ε. Draws the
distance from the minimum, and x where it stays bounded.

Sources: Hinton, Srivastava and Swersky, "Neural networks for machine learning", lecture 6e, 2012
(the rule, which adapts sign descent to mini-batches); Zhang, Lipton, Li and Smola, "Dive into deep
learning", section RMSProp (the question of γ = 1).
"""

import argparse
from collections.abc import Sequence
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drawing import picture
from rmsprop_jax import rmsprop

START = -2.9
LIMIT = 3.2
STYLES = ("s:", "D-.", "^--", "o-", "v-")


def descend(tx: optax.GradientTransformation, steps: int) -> list[float]:
    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        x, state = carry
        updates, state = tx.update(x, state)  # the gradient of x² / 2 is x
        x = optax.apply_updates(x, updates)
        return (x, state), x

    first = jnp.array(START)
    _, x = jax.lax.scan(step, (first, tx.init(first)), length=steps)
    return [START, *x.tolist()]


def gradient_descent(rate: float, steps: int) -> list[float]:
    x = [START]
    for _ in range(steps):
        x.append(x[-1] - rate * x[-1])
    return x


def sign_descent(rate: float, steps: int) -> list[float]:
    x = [START]
    for _ in range(steps):
        x.append(x[-1] - rate * float(np.sign(x[-1])))
    return x


class Run(NamedTuple):
    """A rule, its step and path, the path of the simpler rule it reduces to, and the difference."""

    decay: float
    initial_scale: float
    eps: float
    step: str
    x: list[float]
    simpler: list[float] | None
    difference: float | None


def compare(rate: float, decay: float, initial_scale: float, eps: float, steps: int) -> Run:
    x = descend(rmsprop(rate, decay, eps, initial_scale), steps)
    if decay == 1:
        constant = rate / math.sqrt(initial_scale + eps)
        step, simpler = f"{constant:.4g} g", gradient_descent(constant, steps)
    elif decay == 0:
        step, simpler = f"{rate:g} sign(g)", sign_descent(rate, steps)
    else:
        return Run(decay, initial_scale, eps, f"{rate:g} g / root of s", x, None, None)
    # The squares of gradients above 1e154 overflow; the transformation stays finite.
    pairs = [(a, b) for a, b in zip(x, simpler, strict=True) if abs(b) < 1e150]
    difference = max(abs(a - b) / max(abs(b), rate) for a, b in pairs)
    return Run(decay, initial_scale, eps, step, x, simpler, difference)


def draw(runs: Sequence[Run], out: Path) -> None:
    with picture(out, height=5) as figure:
        distance, position = figure.subplots(1, 2)
        for i, run in enumerate(runs):
            start = "" if run.decay < 1 else f" from s = {run.initial_scale:g}"
            label = rf"$\gamma$ = {run.decay:g}{start}, ε = {run.eps:g}: a step of {run.step}"
            look = {"color": f"C{i}", "markersize": 4}
            distance.plot(np.abs(run.x), STYLES[i], label=label, **look)
            if max(map(abs, run.x)) <= LIMIT:  # a run that diverges would be a vertical line
                position.plot(run.x, STYLES[i], **look)
        distance.set(yscale="log", ylim=(1e-6, 1e6), xlabel="step", ylabel="distance |x| from 0")
        position.set(xlabel="step", ylabel="x")
        position.axhline(0, color="0.6", linewidth=1, zorder=0)
        for axes in (distance, position):
            axes.locator_params(axis="x", integer=True)
        figure.legend(loc="outside lower center")


def print_table(runs: Sequence[Run], steps: int) -> None:
    last = f"x after {steps} steps"
    print(f"decay  s from     eps  {'step':18}  {last:>16}  difference")
    for run in runs:
        rule = f"{run.decay:<5g}  {run.initial_scale:6g}  {run.eps:6g}  {run.step:18}"
        difference = "" if run.difference is None else f"{run.difference:.0e}"
        print(f"{rule}  {run.x[-1]:16.3e}  {difference:>10}".rstrip())


def main(argv: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--eps", type=float, default=1e-6)
    parser.add_argument("--out", type=Path, default=Path("out/extreme_decay.png"))
    args = parser.parse_args(argv)
    rate, eps = args.learning_rate, args.eps
    if args.steps < 1 or not (rate > 0 and eps > 0):
        parser.error("--steps must be at least 1, --learning-rate and --eps positive")

    large = (rate / 1.5) ** 2  # x changes sides and comes closer
    cases = ((1, 0, eps), (1, 0, large), (1, 1, eps), (0, 0, eps), (0.9, 0, eps))
    with jax.enable_x64(True):  # so that the differences are not rounding
        runs = [compare(rate, decay, start, at, args.steps) for decay, start, at in cases]

    draw(runs, args.out)
    print_table(runs, args.steps)
    before, last = runs[3].x[-2:]
    print(f"The last step at decay 0 is from {before:.4f} to {last:.4f}, picture in {args.out}")
    return runs


if __name__ == "__main__":
    main()
