"""Linear regression with RMSProp, written from scratch in a few lines and in calls of the library.

    python examples/airfoil.py                # two epochs over 1500 measurements of wing noise
    python examples/airfoil.py --decay 0.99   # a longer memory

Compares five ways: the rule in plain JAX, `rmsprop`, the same rule as PyTorch and as Keras define
it, and the exact least-squares solution. Prints the last loss of each, and how far its losses were
at most from those of the rule in plain JAX: `rmsprop` differs by rounding, the other two because
their eps is smaller and PyTorch's is outside the root. Draws both. The loss is half the mean
squared error over all rows, in units of the target's variance.

The task, the batches of 10 and the hyperparameters are those of section 12.8, "RMSProp", in Zhang,
Lipton, Li and Smola, Dive into Deep Learning; the rule is from Hinton, Srivastava and Swersky,
"Neural networks for machine learning", lecture 6e, 2012.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import picture
import real_data
from rmsprop_jax import dialects, rmsprop

Rows = NDArray[np.float32]
Params = dict[str, jax.Array]

SCRATCH = "from scratch"


class Method(NamedTuple):
    """An optimizer: a function that makes its state, and one that makes a step."""

    init_states: Callable[[Params], Any]
    update: Callable[[Params, Params, Any], tuple[Params, Any]]


def from_scratch(learning_rate: float, decay: float, eps: float) -> Method:
    """The rule itself: x <- x - learning_rate g / sqrt(s + eps)."""

    def init_states(params: Params) -> Params:
        return {name: jnp.zeros_like(x) for name, x in params.items()}

    def update(params: Params, grads: Params, s: Params) -> tuple[Params, Params]:
        s = {name: decay * s[name] + (1 - decay) * g**2 for name, g in grads.items()}
        steps = {name: learning_rate * g / jnp.sqrt(s[name] + eps) for name, g in grads.items()}
        return {name: x - steps[name] for name, x in params.items()}, s

    return Method(init_states, update)


def concise(tx: optax.GradientTransformation) -> Method:
    def update(params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Method(tx.init, update)


@jax.jit
def half_mse(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y)) / 2


def train(
    method: Method, params: Params, x: Rows, y: Rows, batches: NDArray[np.int64], every: int
) -> list[float]:
    """The losses over all rows: at the start, after every `every` batches, and at the end."""

    @jax.jit
    def step(params: Params, states: Any, x: Rows, y: Rows) -> tuple[Params, Any]:
        return method.update(params, jax.grad(half_mse)(params, x, y), states)

    states = method.init_states(params)
    losses = [half_mse(params, x, y)]
    for count, rows in enumerate(batches, 1):
        params, states = step(params, states, x[rows], y[rows])
        if count % every == 0 or count == len(batches):
            losses.append(half_mse(params, x, y))
    return [float(loss) for loss in losses]


def data() -> tuple[Rows, Rows]:
    """The first 1500 rows; inputs and target have mean 0 and variance 1 over all rows."""
    rows = real_data.airfoil()
    rows = ((rows - rows.mean(axis=0)) / rows.std(axis=0))[:1500]
    return rows[:, :-1], rows[:, -1]


def least_squares(x: Rows, y: Rows) -> float:
    """The lowest loss that a linear model can have."""
    columns = np.column_stack([x, np.ones(len(x))]).astype(float)
    line = np.linalg.lstsq(columns, y.astype(float), rcond=None)[0]
    return float(np.mean((columns @ line - y) ** 2) / 2)


class Result(NamedTuple):
    """The losses of each method after `epochs` (may be fractions), and that of least squares."""

    epochs: list[float]
    losses: dict[str, list[float]]
    floor: float


def differences(result: Result) -> dict[str, list[float]]:
    """How far the losses of the other methods are from those of the rule in plain JAX."""
    first = result.losses[SCRATCH]
    others = [name for name in result.losses if name != SCRATCH]
    return {name: np.abs(np.subtract(result.losses[name], first)).tolist() for name in others}


def draw(result: Result, out: Path) -> None:
    with picture(out, height=3.8) as figure:
        curves, apart = figure.subplots(1, 2)
        # The curves cannot be told apart; the other half of the picture shows their differences.
        curves.plot(result.epochs, result.losses[SCRATCH], color="black", label="all four methods")
        level = [result.floor] * len(result.epochs)
        curves.plot(result.epochs, level, color="0.4", linestyle=":", label="least squares")
        curves.set(xlabel="epoch", ylabel="loss (half the mean squared error)")
        curves.legend()
        for (name, away), style in zip(
            differences(result).items(), ("o", "s-", "^--"), strict=True
        ):
            # Rounding errors come and go: draw points, and none where the losses are equal.
            seen = np.where(np.greater(away, 0), away, np.nan)
            label = f"{name}, where not 0" if style == "o" else name
            apart.plot(result.epochs, seen, style, markersize=4, label=label)
        apart.set(xlabel="epoch", ylabel=f"difference from the loss {SCRATCH}", yscale="log")
        apart.legend()


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--every", type=int, default=10, help="batches between losses")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--eps", type=float, default=1e-6, help="PyTorch and Keras keep their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/airfoil.png"))
    args = parser.parse_args(argv)

    x, y = data()
    if args.epochs < 1 or args.every < 1 or not 1 <= args.batch <= len(x):
        parser.error(f"--epochs and --every must be at least 1, --batch from 1 to {len(x)}")
    numbers = args.learning_rate, args.decay
    methods = {
        SCRATCH: from_scratch(*numbers, args.eps),
        "rmsprop": concise(rmsprop(*numbers, args.eps)),
        "pytorch": concise(dialects.pytorch(*numbers)),
        "keras": concise(dialects.keras(*numbers)),
    }
    rng = np.random.default_rng(args.seed)
    w = 0.01 * rng.standard_normal(x.shape[1], dtype=np.float32)
    params = {"w": jnp.asarray(w), "b": jnp.zeros([])}
    # Shuffled for each epoch, alike for every method; an incomplete last batch is dropped.
    n = len(x) // args.batch
    orders = [rng.permutation(len(x))[: n * args.batch] for _ in range(args.epochs)]
    batches = np.concatenate(orders).reshape(-1, args.batch)

    losses = {}
    for name, method in (bar := tqdm(methods.items(), unit="method")):
        bar.set_description(f"{name:12}")
        losses[name] = train(method, params, x, y, batches, args.every)
    counts = [0, *range(args.every, len(batches), args.every), len(batches)]
    result = Result([count / n for count in counts], losses, least_squares(x, y))

    draw(result, args.out)
    print(f"{'':13}  last loss  max difference")
    print(f"{SCRATCH:13}  {losses[SCRATCH][-1]:9.5f}")
    for name, away in differences(result).items():
        print(f"{name:13}  {losses[name][-1]:9.5f}  {max(away):14.1e}")
    print(f"least squares  {result.floor:9.5f}\n\nCurves in {args.out}")
    return result


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"airfoil.py: {error}") from None
