"""Seven runs that go wrong, what `diagnostics` says of each, and the same runs put right.

    python examples/when_it_goes_wrong.py             # half a minute on two cores

A small network learns a smooth function of eight inputs from 256 rows that are made up, 32 at a
time. Each case changes one thing, in the data, the network or the optimizer, so that the run fails
the way other people's runs fail. The cure then changes the optimizer alone. All seven are explained
in docs/how-to/when-a-run-goes-wrong.md.

Prints for each case the loss over all rows at the end (the median of the last twentieth of the
steps) and some of the numbers that `diagnostics` gives at the step that is named, without the cure
and with it. Draws the losses, and beside them the number that tells the most.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.axes import Axes
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import picture
from rmsprop_jax import diagnostics, dialects, low_memory, rmsprop

Params = list[tuple[jax.Array, jax.Array]]
Rows = NDArray[np.float32]

INPUTS, ROWS, BATCH = 8, 256, 32
RELATIVE, MEDIAN, LOST = "update/relative_norm", "effective_lr/median", "update/lost_in_bfloat16"
WRONG, RIGHT = "C1", "C0"


class Setup(NamedTuple):
    """A network and what it learns: all rows, and the batches of each step."""

    params: Params
    x: Rows
    y: Rows
    x_batches: Rows  # (steps, batch, inputs)
    y_batches: Rows
    loss_scale: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh


def network(seed: int, widths: Sequence[int], gain: float = 1.0) -> Params:
    keys = jax.random.split(jax.random.key(seed), len(widths))
    return [
        (jax.random.normal(key, (n, m)) * gain / n**0.5, jnp.zeros(m))
        for key, n, m in zip(keys, widths, widths[1:], strict=False)
    ]


def mse(given: Setup, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    *hidden, (w, b) = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    for weights, bias in hidden:
        x = given.activation(x @ weights + bias)
    return jnp.mean(jnp.square((x @ w + b)[:, 0] - y))


def setup(steps: int, seed: int) -> Setup:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, INPUTS), np.float32)
    direction = rng.standard_normal(INPUTS) / INPUTS**0.5
    y = np.sin(2 * x @ direction).astype(np.float32)
    some = rng.integers(0, ROWS, (steps, BATCH))
    return Setup(network(seed, (INPUTS, 32, 1)), x, y, x[some], y[some])


def bad_row(given: Setup) -> Setup:
    """One value in one batch is missing."""
    x = given.x_batches.copy()
    x[len(x) // 5, 0, 0] = np.nan
    return given._replace(x_batches=x)


def outlier(given: Setup) -> Setup:
    """One target in one batch is a billion."""
    y = given.y_batches.copy()
    y[len(y) // 5, 0] = 1e9
    return given._replace(y_batches=y)


def trained(given: Setup) -> Setup:
    """The network has learnt already."""
    falling = optax.cosine_decay_schedule(3e-3, len(given.x_batches))
    return given._replace(params=train(rmsprop(falling), given, ()).params)


def deep(given: Setup) -> Setup:
    """The network has three hidden layers of ReLU."""
    params = network(0, (INPUTS, 64, 64, 64, 1), gain=2**0.5)
    return given._replace(params=params, activation=jax.nn.relu)


def tiny_loss(given: Setup) -> Setup:
    """The loss is divided by a million."""
    return given._replace(loss_scale=1e-6)


def in_bfloat16(given: Setup) -> Setup:
    return given._replace(params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), given.params))


def same(given: Setup) -> Setup:
    return given


class Case(NamedTuple):
    """What goes wrong, and the cure: each a label and, for the number of steps, a transformation.

    Of what diagnostics tells, show is printed at a step, this part of the way; its first is drawn.
    Others are run for their losses alone.
    """

    name: str
    change: Callable[[Setup], Setup]
    wrong: tuple[str, Callable[[int], optax.GradientTransformation]]
    right: tuple[str, Callable[[int], optax.GradientTransformation]]
    show: tuple[str, ...]
    at: float
    others: Mapping[str, Callable[[int], optax.GradientTransformation]] = {}


def tensorflow_by_hand(rate: float) -> optax.GradientTransformation:
    """The run of another framework: TensorFlow 1's RMSProp, in two lines."""

    def update(grads: Any, s: Any, params: Any = None) -> Any:
        del params
        s = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * g**2, s, grads)
        return jax.tree.map(lambda g, s: -rate * g / jnp.sqrt(s + 1e-10), grads, s), s

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.ones_like, params), update)


def deviant(eps: float, warm_up: int = 0, centered: bool = True) -> optax.GradientTransformation:
    rate = optax.linear_schedule(0, 5e-3, warm_up) if warm_up else 5e-3
    return rmsprop(rate, decay=0.99, eps=eps, centered=centered, momentum=0.9)


CASES = [
    Case(
        "NaN",
        bad_row,
        ("rmsprop", lambda _: rmsprop(3e-3)),
        ("in apply_if_finite", lambda _: optax.apply_if_finite(rmsprop(3e-3), 5)),
        ("not_finite/params", "not_finite/grads", "not_finite/state"),
        0.201,
    ),
    Case(
        "Standstill after one huge gradient",
        outlier,
        ("rmsprop", lambda _: rmsprop(3e-3, decay=0.99)),
        (
            "after clipping by the norm",
            lambda _: optax.chain(optax.clip_by_global_norm(1.0), rmsprop(3e-3, decay=0.99)),
        ),
        (MEDIAN, RELATIVE),
        0.201,
    ),
    Case(
        "Jump of the loss at the first steps",
        trained,
        ("decay 0.999", lambda _: rmsprop(1e-3, decay=0.999)),
        ("with bias correction", lambda _: rmsprop(1e-3, decay=0.999, bias_correction=True)),
        (RELATIVE,),
        0.0,
    ),
    Case(
        "Centered, with a small eps",
        deep,
        ("eps = 1e-8", lambda _: deviant(1e-8)),
        ("eps = 1e-2, warm-up", lambda n: deviant(1e-2, n // 10)),
        ("effective_lr/p95", MEDIAN, RELATIVE, "below_eps"),
        0.5,
        {
            "eps = 1e-2": lambda _: deviant(1e-2),
            "eps = 1e-8, warm-up": lambda n: deviant(1e-8, n // 10),
            "not centered, eps = 1e-8": lambda _: deviant(1e-8, centered=False),
            "not centered, eps = 1e-2, warm-up": lambda n: deviant(1e-2, n // 10, centered=False),
        },
    ),
    Case(
        "eps larger than the second moments",
        tiny_loss,
        ("eps = 1e-8", lambda _: rmsprop(3e-3)),
        ("eps = 1e-20", lambda _: rmsprop(3e-3, eps=1e-20)),
        ("below_eps", MEDIAN, RELATIVE),
        0.5,
    ),
    Case(
        "Parameters in bfloat16",
        in_bfloat16,
        ("rmsprop", lambda n: rmsprop(optax.linear_schedule(3e-4, 0, n))),
        (
            "in master_weights",
            lambda n: low_memory.master_weights(rmsprop(optax.linear_schedule(3e-4, 0, n))),
        ),
        (LOST, RELATIVE),
        0.5,
    ),
    Case(
        "A different curve from TensorFlow 1",
        same,
        ("rmsprop, eps = 1e-10", lambda _: rmsprop(3e-3, eps=1e-10)),
        ("dialects.tensorflow_v1", lambda _: dialects.tensorflow_v1(3e-3)),
        (RELATIVE, MEDIAN),
        0.0,
    ),
]


class Run(NamedTuple):
    """The parameters at the end; for each step the loss after it, and what is told before it."""

    params: Params
    losses: NDArray[np.float64]
    told: dict[str, NDArray[np.float64]]


def train(tx: optax.GradientTransformation, given: Setup, show: Sequence[str]) -> Run:
    x, y = jnp.asarray(given.x), jnp.asarray(given.y)

    def scaled(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return given.loss_scale * mse(given, params, x, y)

    def step(run: Any, batch: Any) -> Any:
        params, state = run
        grads = jax.grad(scaled)(params, *batch)
        told = diagnostics(tx, state, params, grads) if show else {}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (mse(given, params, x, y), {name: told[name] for name in show})

    def run(params: Params, batches: Any) -> Any:
        return lax.scan(step, (params, tx.init(params)), batches)

    batches = jnp.asarray(given.x_batches), jnp.asarray(given.y_batches)
    (params, _), told = jax.jit(run)(given.params, batches)
    losses, numbers = jax.device_get(told)
    return Run(params, losses, numbers)


class Result(NamedTuple):
    """The run that goes wrong, the one with the cure, others, and another framework's losses."""

    wrong: Run
    right: Run
    others: dict[str, Run]
    other: NDArray[np.float64] | None


def late(run: Run) -> float:
    """The loss at the end."""
    return float(np.median(run.losses[-max(1, len(run.losses) // 20) :]))


def step_of(case: Case, steps: int) -> int:
    return int(case.at * steps)


def apart(run: Run, other: NDArray[np.float64]) -> float:
    """The largest difference of two losses, relative to the other's."""
    return float(np.max(np.abs(run.losses - other) / other))


def print_tables(results: dict[str, Result]) -> None:
    for case in CASES:
        wrong, right, others, other = results[case.name]
        at = step_of(case, len(wrong.losses))
        print(f"{case.name}, at step {at + 1}")
        print(f"{'':26}{case.wrong[0]:>28}{case.right[0]:>28}")
        rows = [
            ("highest loss", float(np.max(wrong.losses)), float(np.max(right.losses))),
            ("loss at the end", late(wrong), late(right)),
        ]
        if other is not None:
            rows.append(("losses apart, at most", apart(wrong, other), apart(right, other)))
        rows += [(n, float(wrong.told[n][at]), float(right.told[n][at])) for n in case.show]
        for name, before, after in rows:
            print(f"{name:26}{before:28.3g}{after:28.3g}")
        if others:
            print(f"{'other runs':40}{'highest loss':>14}{'loss at the end':>28}")
        for name, run in others.items():
            print(f"{name:40}{np.max(run.losses):14.3g}{late(run):28.3g}")
        print()


def draw_case(losses: Axes, numbers: Axes, case: Case, result: Result) -> None:
    steps = np.arange(1, len(result.wrong.losses) + 1)
    looks = ((result.wrong, case.wrong[0], WRONG, "-"), (result.right, case.right[0], RIGHT, "--"))
    shown = case.show[0]
    if result.other is not None:
        losses.plot(steps, result.other, color="0.75", linewidth=4, label="TensorFlow 1")
    for run, label, color, line in looks:
        losses.plot(steps, run.losses, line, color=color, linewidth=1.2, label=label)
        numbers.plot(steps, run.told[shown], line, color=color, linewidth=1.2)
        if not np.all(np.isfinite(run.losses)):
            last = int(np.argmin(np.isfinite(run.losses))) - 1
            losses.plot(steps[last], run.losses[last], "x", color=color, label="NaN from here on")
    losses.set(yscale="log", ylabel="loss")
    losses.set_title(case.name, loc="left")
    losses.legend(loc="best")
    numbers.set_title(shown, loc="left")
    if shown.startswith(("not_finite", "below_eps", LOST)):
        numbers.set(ylim=(-0.05, 1.05))
    else:
        numbers.set(yscale="log")
    if case.at == 0:  # it happens at once
        for axes in (losses, numbers):
            axes.set(xscale="log")


def draw(results: dict[str, Result], out: Path) -> None:
    with picture(out, 2 * len(CASES)) as figure:
        rows = figure.subplots(len(CASES), 2)
        for case, (losses, numbers) in zip(CASES, rows, strict=True):
            draw_case(losses, numbers, case, results[case.name])
            for axes in (losses, numbers):
                axes.set_xlabel("step", loc="right", labelpad=0)


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/when_it_goes_wrong.png"))
    args = parser.parse_args(argv)
    if args.steps < 20:
        parser.error("--steps must be at least 20")
    if args.seed < 0:
        parser.error("--seed must not be negative")

    results, plain = {}, setup(args.steps, args.seed)
    total = sum(2 + len(case.others) for case in CASES)
    with tqdm(total=total, unit="run") as bar:
        for case in CASES:
            bar.set_description(case.name)
            given, runs = case.change(plain), []
            for _, make in (case.wrong, case.right):
                runs.append(train(make(args.steps), given, case.show))
                bar.update()
            is_other = "TensorFlow" in case.name
            other = train(tensorflow_by_hand(3e-3), given, ()).losses if is_other else None
            others = {}
            for label, make in case.others.items():
                others[label] = train(make(args.steps), given, ())
                bar.update()
            results[case.name] = Result(runs[0], runs[1], others, other)
    draw(results, args.out)
    print_tables(results)
    print(f"Curves in {args.out}")
    return results


if __name__ == "__main__":
    main()
