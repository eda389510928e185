"""How long RMSProp remembers: the weight of a past gradient, by its age.

    python examples/decay_weights.py                # decays of 0.95, 0.9, 0.8 and 0.7
    python examples/decay_weights.py --decay 0.99 0.9 --steps 100

In the running mean s <- γ s + (1 - γ) g², the squared gradient of t steps ago has the weight
(1 - γ) γ^t. This example does not compute the weights but measures them: it passes one gradient of
1, followed by zeros, through the transformation and reads its state after each step. The mean age
of the weights is 1 / (1 - γ), if the newest gradient counts as 1 step old; this is the effective
memory. For each decay it prints the memory, and the share of the total weight that belongs to the
gradients within it, rounded to whole steps. The share tends to 1 - 1/e = 63.2% as γ tends to 1.
Draws the measured weights over lines from the formula.

Sources: Hinton, Srivastava and Swersky, "Neural networks for machine learning", lecture 6e, 2012
(the rule); Zhang, Lipton, Li and Smola, "Dive into deep learning", section RMSProp (the question).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from drawing import picture
from rmsprop_jax import RMSPropState, scale_by_rms

MARKERS = "os^Dv*"
TITLE = "markers: measured\nlines: $(1 - \\gamma)\\,\\gamma^t$\nbars: $t = 1 / (1 - \\gamma)$"


def measured(decay: float, steps: int) -> NDArray[np.float32]:
    """What a gradient of 1 contributes to the running mean, at its own step and all later ones."""
    tx = scale_by_rms(decay)

    def step(state: RMSPropState, gradient: jax.Array) -> tuple[RMSPropState, jax.Array]:
        _, state = tx.update(gradient, state)
        return state, state.nu

    _, weights = jax.lax.scan(step, tx.init(jnp.zeros(())), jnp.zeros(steps).at[0].set(1))
    return np.asarray(weights)


def formula(decay: float, age: NDArray) -> NDArray[np.float64]:
    return (1 - decay) * decay**age


class Result(NamedTuple):
    """The weights by age, the memory in steps, as is and rounded, and its share of the weight."""

    weights: NDArray[np.float32]
    memory: float
    within: int
    share: float


def draw(results: Mapping[float, Result], out: Path) -> None:
    with picture(out, height=4.4) as figure:
        axes = figure.subplots()
        for i, (decay, result) in enumerate(results.items()):
            color, marker = f"C{i}", MARKERS[i % len(MARKERS)]
            fine = np.linspace(0, len(result.weights) - 1, 400)
            axes.plot(fine, formula(decay, fine), color=color, linestyle="-", linewidth=1)
            axes.plot(result.weights, marker, color=color, label=rf"$\gamma$ = {decay:g}", zorder=3)
            height = formula(decay, np.array(result.memory))
            axes.vlines(result.memory, 0, height, color=color, linewidth=3)
            axes.annotate(
                f"{result.memory:.3g} steps",
                (result.memory, height),
                xytext=(8, 14),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "linewidth": 0.7},
            )
        axes.set(xlabel="age $t$ of the gradient, steps", ylabel="weight of its square in $s$")
        axes.set(xlim=(-0.5, None), ylim=(0, None))
        axes.legend(title=TITLE)


def main(argv: Sequence[str] | None = None) -> dict[float, Result]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decay", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/decay_weights.png"))
    args = parser.parse_args(argv)
    if not all(0 <= decay < 1 for decay in args.decay):
        parser.error("--decay must be at least 0 and below 1: at 1 gradients have no weight")
    longest = round(1 / (1 - max(args.decay)))
    if args.steps < longest:
        parser.error(f"--steps must be at least {longest}, the longest memory")

    results = {}
    for decay in args.decay:
        weights, memory = measured(decay, args.steps), 1 / (1 - decay)
        within = round(memory)
        results[decay] = Result(weights, memory, within, float(weights[:within].sum()))

    draw(results, args.out)
    print("decay  1 / (1 - decay)  share of the weight")
    for decay, result in results.items():
        newest = f"newest {result.within}"
        print(f"{decay:<5g}  {result.memory:9.1f} steps  {newest:>9}: {result.share:.1%}")
    age = np.arange(args.steps)
    away = max(np.abs(r.weights - formula(decay, age)).max() for decay, r in results.items())
    print(f"Measured weights differ from the formula by at most {away:.0e}, picture in {args.out}")
    return results


if __name__ == "__main__":
    main()
