"""The effective learning rates of Adagrad and RMSProp: one keeps falling, the other settles.

    python examples/adagrad_vs_rmsprop.py                # 40 epochs over measurements of wing noise
    python examples/adagrad_vs_rmsprop.py --epochs 200   # longer

Both methods divide the gradient by sqrt(s + eps), so a parameter moves at the effective learning
rate learning_rate / sqrt(s + eps). In Adagrad s is the sum of all squared gradients and can only
grow; in RMSProp it is their running mean. A network with one hidden layer learns from 1202 rows.
For each method the learning rate is chosen from the same list, on seeds that are not used again;
then s is read from the states of new runs. Prints the losses of the choice; then, for the new runs,
the median of the effective rate over all parameters after some steps, and its lowest and highest
value from the end of the first epoch on. Losses are over all rows; the printed ones are the mean
over the last quarter of the epochs. Draws both.

A hidden unit that has died has no gradient. In Adagrad its effective rates then stay where they
are; in RMSProp, where s decays, they climb to learning_rate / sqrt(eps). The share of parameters
that have reached this limit is printed, too. Once it exceeds a quarter, the limit is the upper
quartile.

Sources: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic
optimization", Journal of Machine Learning Research 12, 2011 (Adagrad); Hinton, Srivastava and
Swersky, "Neural networks for machine learning", lecture 6e, 2012 (RMSProp). The comparison follows
the motivation in section 12.8 of Zhang, Lipton, Li and Smola, Dive into Deep Learning.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import label_ends, picture
import real_data
from rmsprop_jax import rmsprop

Rows = NDArray[np.float32]
Params = dict[str, jax.Array]

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
QUANTILES = (0.25, 0.5, 0.75)


class Method(NamedTuple):
    """A function from learning rate and eps to a transformation, and the name of s in its state."""

    make: Callable[[Any, float], optax.GradientTransformation]
    s: str


METHODS = {
    "rmsprop": Method(lambda rate, eps: rmsprop(rate, decay=0.9, eps=eps), "nu"),
    "adagrad": Method(
        lambda rate, eps: optax.adagrad(rate, initial_accumulator_value=0.0, eps=eps),
        "sum_of_squares",
    ),
}


def network(key: jax.Array) -> Params:
    """Five inputs, 50 hidden units, one output."""
    hidden, output = jax.random.split(key)
    return {
        "w1": jax.random.normal(hidden, (5, 50)) / 5**0.5,
        "b1": jnp.zeros(50),
        "w2": jax.random.normal(output, (50,)) / 50**0.5,
        "b2": jnp.zeros([]),
    }


def mse(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return jnp.mean(jnp.square(hidden @ params["w2"] + params["b2"] - y))


def effective_rates(state: Any, s: str, rate: Any, eps: float) -> jax.Array:
    """The factor of the gradient in the step, for each parameter."""
    squares = jax.tree.leaves(optax.tree.get(state, s))
    return rate / jnp.sqrt(jnp.concatenate([leaf.ravel() for leaf in squares]) + eps)


class Trained(NamedTuple):
    """The loss over all rows after each epoch, and all effective rates at each step."""

    losses: Any
    rates: Any


def train(
    method: Method, eps: float, x: Rows, y: Rows, rate: Any, params: Params, batches: Any
) -> Trained:
    """Trains one network; `batches` holds row numbers, of shape (epochs, steps, size)."""
    tx = method.make(rate, eps)
    inputs, targets = jnp.asarray(x), jnp.asarray(y)

    def step(run: tuple[Params, Any], rows: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = run
        grads = jax.grad(mse)(params, inputs[rows], targets[rows])
        updates, state = tx.update(grads, state, params)
        rates = effective_rates(state, method.s, rate, eps)
        return (optax.apply_updates(params, updates), state), rates

    def epoch(run: tuple[Params, Any], rows: jax.Array) -> tuple[tuple[Params, Any], Trained]:
        run, rates = lax.scan(step, run, rows)
        return run, Trained(mse(run[0], inputs, targets), rates)

    _, trained = lax.scan(epoch, (params, tx.init(params)), batches)
    return trained


def data(seed: int) -> tuple[Rows, Rows]:
    """Four fifths of the rows, each column standardized to mean 0 and standard deviation 1."""
    rows = np.random.default_rng(seed).permutation(real_data.airfoil())
    rows = rows[: len(rows) * 4 // 5]
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    return rows[:, :-1], rows[:, -1]


def batches_of(rows: int, epochs: int, size: int, seeds: Iterable[int]) -> NDArray[np.int64]:
    """Row numbers, shuffled for each seed and epoch; an incomplete last batch is dropped."""
    orders = [
        [rng.permutation(rows)[: rows // size * size] for _ in range(epochs)]
        for rng in map(np.random.default_rng, seeds)
    ]
    return np.reshape(orders, (-1, epochs, rows // size, size))


class Run(NamedTuple):
    """The results of one method.

    `sweep` has the late loss at each of RATES, averaged over the seeds, and `rate` is the best of
    them. The other fields are of the new seeds: the late loss and the loss after each epoch,
    averaged over the seeds; the quantiles of the effective rate over the parameters of all
    networks, of shape (steps, 3); and the share of these parameters whose rate ends within 1% of
    its limit, because their gradient has become 0.
    """

    sweep: list[float]
    rate: float
    loss: float
    losses: list[float]
    effective: NDArray[np.float64]
    at_limit: float


def late(losses: Any) -> Any:
    """The mean over the last quarter of the epochs."""
    epochs = np.shape(losses)[-1]
    return np.asarray(losses)[..., epochs * 3 // 4 :].mean(axis=-1)


def steps_to_show(steps: int, epochs: int) -> list[int]:
    """The first step, the ends of the first epoch and of the middle one, and the last step."""
    per_epoch = steps // epochs
    return sorted({1, per_epoch, per_epoch * ((epochs + 1) // 2), steps})


def print_tables(runs: dict[str, Run], epochs: int) -> None:
    print("Loss over the last quarter of the epochs, at a learning rate of")
    print(f"{'':7}" + "".join(f"{rate:9g}" for rate in RATES))
    for name, run in runs.items():
        print(f"{name:7}" + "".join(f" {loss:8.4f}" for loss in run.sweep))
    at = steps_to_show(len(next(iter(runs.values())).effective), epochs)
    print("\nMedian effective learning rate after step")
    print(f"{'':7}" + "".join(f"{step:9}" for step in at) + "   chosen     loss")
    for name, run in runs.items():
        medians = "".join(f" {run.effective[step - 1, 1]:8.4f}" for step in at)
        print(f"{name:7}{medians}{run.rate:9g}{run.loss:9.4f}")
    first = next(iter(runs.values())).effective.shape[0] // epochs
    print(f"\nFrom step {first} on            lowest  highest   at the end at η / √ε")
    for name, run in runs.items():
        later = run.effective[first - 1 :, 1]
        print(f"{name:24}  {later.min():8.4f} {later.max():8.4f}{run.at_limit:23.1%}")


def draw(runs: dict[str, Run], eps: float, out: Path) -> None:
    with picture(out, height=3.8) as figure:
        rates, curves = figure.subplots(1, 2, width_ratios=(3, 2))
        for name, run in runs.items():
            steps = np.arange(1, len(run.effective) + 1)
            low, median, high = run.effective.T
            (line,) = rates.plot(steps, median, label=f"{name},\nη = {run.rate:g}")
            color = line.get_color()
            rates.fill_between(steps, low, high, alpha=0.25, color=color, linewidth=0)
            if run.at_limit:
                limit = run.rate / np.sqrt(eps)
                rates.axhline(limit, color=color, linewidth=1, linestyle=":")
                label = f"units without a gradient: η / √ε = {limit:g}"
                place: Any = {"textcoords": "offset points", "ha": "right"}
                rates.annotate(label, (steps[-1], limit), (0, 3), fontsize=9, **place)
            curves.plot(range(1, len(run.losses) + 1), run.losses, label=name)
        rates.set(xlabel="step", ylabel="effective learning rate η / √(s + ε)")
        rates.set(xscale="log", yscale="log", title="median and middle half of all parameters")
        label_ends(rates)
        curves.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
        curves.legend()


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--seeds", type=int, default=8, help="for the choice; as many follow")
    parser.add_argument("--out", type=Path, default=Path("out/adagrad_vs_rmsprop.png"))
    args = parser.parse_args(argv)

    x, y = data(seed=0)
    if args.epochs < 1 or args.seeds < 1 or not 1 <= args.batch <= len(x):
        parser.error(f"--epochs and --seeds must be at least 1, --batch from 1 to {len(x)}")
    n = args.seeds
    seeds = np.arange(2 * n)
    networks = jax.vmap(lambda seed: network(jax.random.key(seed)))
    batches = batches_of(len(x), args.epochs, args.batch, seeds)
    first, new = (networks(seeds[:n]), batches[:n]), (networks(seeds[n:]), batches[n:])

    runs = {}
    with tqdm(total=len(METHODS) * (len(RATES) + 1), unit="run") as bar:
        for name, method in METHODS.items():
            bar.set_description(name)
            of_one = functools.partial(train, method, args.eps, x, y)
            of_seeds = jax.jit(jax.vmap(of_one, (None, 0, 0)))  # compiled once for all rates
            sweep = []
            for rate in RATES:
                trained = of_seeds(rate, *first)
                sweep.append(float(late(trained.losses).mean()))
                bar.update()
            rate = RATES[int(np.nanargmin(sweep))]
            trained = of_seeds(rate, *new)
            bar.update()
            losses = np.asarray(trained.losses).mean(axis=0)
            # Of shape (seeds, epochs, steps, parameters).
            effective = np.quantile(trained.rates, QUANTILES, axis=(0, -1))
            effective = effective.reshape(len(QUANTILES), -1).T
            last, limit = np.asarray(trained.rates[:, -1, -1]), rate / args.eps**0.5
            at_limit = float(np.mean(last > 0.99 * limit))
            runs[name] = Run(sweep, rate, float(late(losses)), losses.tolist(), effective, at_limit)

    draw(runs, args.eps, args.out)
    print_tables(runs, args.epochs)
    print(f"\nCurves in {args.out}")
    return runs


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"adagrad_vs_rmsprop.py: {error}") from None
