"""How much the decay of RMSProp matters, and whether changing it during training helps.

    python examples/adaptive_decay.py             # 8 decays and 4 schedules, 24 networks each
    python examples/adaptive_decay.py --seeds 96  # half the standard error

A network with one hidden layer learns the noise of an airfoil from 1202 measurements, at several
learning rates, without and with bias correction. For each of the two, all decays, rates and seeds
are one compiled program: a decay may be an array, or a function that looks up each step's decay in
an array.

Prints the training losses over the last quarter of the steps, as mean and standard deviation over
the seeds, and then compares the usual decay of .9 and each schedule with the best constant decay.
For this comparison each uses the learning rate that is best for it on one half of the seeds, and
the losses come from the other half. The printed difference is between networks that start alike and
see the same batches, with its standard error. Without correction the first step is
1 / sqrt(1 - decay) learning rates long, 32 at .999, and the next ones are long, too: there a high
decay also acts like a falling learning rate. Draws both.

Adapting the decay during training is an exercise in section 12.8, "RMSProp", of Zhang, Lipton, Li
and Smola, Dive into Deep Learning. The schedule 1 - t^-.8 is from Shazeer and Stern, "Adafactor",
arXiv:1804.04235, 2018.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import picture
import real_data
from rmsprop_jax import rmsprop

Rows = NDArray[np.float32]
Params = dict[str, jax.Array]

CONSTANTS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
CORRECTIONS = ("Without", "With")
RATES = (0.0025, 0.005, 0.01, 0.02)


def schedules(steps: int) -> dict[str, NDArray[np.float64]]:
    """The decay at each step, by the name of the schedule."""
    t = np.arange(1.0, steps + 1)
    done = (t - 1) / steps
    return {
        "1 - 1/t up to .999": np.minimum(1 - 1 / t, 0.999),  # s starts as a plain mean
        "1 - t^-.8": 1 - t**-0.8,
        ".9 rising to .999": 1 - 0.1 * 0.01**done,
        ".999 falling to .9": 1 - 0.001 * 100**done,
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


def final_losses(
    decays: Rows, seeds: Sequence[int], batches: Any, x: Rows, y: Rows, bias_correction: bool
) -> Rows:
    """The loss at the end of training, for every decay, learning rate and seed.

    This is the mean loss over the last quarter of the batches, each taken before its step. Each
    decay is an array with one number per step; the batches of a seed are row numbers.
    """

    def final_loss(decay: jax.Array, rate: jax.Array, params: Params, order: jax.Array) -> Any:
        tx = rmsprop(rate, lambda count: decay[count], bias_correction=bias_correction)
        inputs, targets = jnp.asarray(x), jnp.asarray(y)

        def step(run: tuple[Params, Any], rows: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
            params, state = run
            loss, grads = jax.value_and_grad(mse)(params, inputs[rows], targets[rows])
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        _, losses = lax.scan(step, (params, tx.init(params)), order)
        return losses[len(losses) * 3 // 4 :].mean()

    networks = jax.vmap(lambda seed: network(jax.random.key(seed)))(np.asarray(seeds))
    of_seeds = jax.vmap(final_loss, (None, None, 0, 0))
    of_rates = jax.vmap(of_seeds, (None, 0, None, None))
    of_decays = jax.jit(jax.vmap(of_rates, (0, None, None, None)))
    return np.asarray(of_decays(decays, np.asarray(RATES, np.float32), networks, batches))


def data(seed: int) -> tuple[Rows, Rows]:
    """Four fifths of the rows, each column standardized to mean 0 and standard deviation 1."""
    rows = np.random.default_rng(seed).permutation(real_data.airfoil())
    rows = rows[: len(rows) * 4 // 5]
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    return rows[:, :-1], rows[:, -1]


def epochs_of_batches(rows: int, epochs: int, size: int, seed: int) -> NDArray[np.int64]:
    """Row numbers, shuffled for each epoch; an incomplete last batch is dropped."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(rows)[: rows // size * size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, size)


class Best(NamedTuple):
    """A decay, its best rate on the first half of the seeds, and its losses on the other half."""

    name: str
    rate: float
    losses: list[float]


def best(names: Sequence[str], losses: Rows) -> Best:
    """The best decay and rate, from the losses of each decay, rate and seed."""
    first, other = np.array_split(losses, 2, axis=-1)
    decay, rate = divmod(int(first.mean(axis=-1).argmin()), len(RATES))
    return Best(names[decay], RATES[rate], other[decay, rate].tolist())


class Result(NamedTuple):
    """The losses, indexed by correction, decay, rate and seed, and the comparison.

    For both corrections `compared` lists the best constant decay, then .9 and the schedules.
    """

    names: list[str]
    losses: Rows
    compared: list[list[Best]]


def difference(one: Best, other: Best) -> tuple[float, float]:
    """How far the first loss is above the second: mean over the seeds, and standard error."""
    away = np.subtract(one.losses, other.losses)
    return float(away.mean()), float(away.std(ddof=1) / len(away) ** 0.5)


def print_tables(result: Result) -> None:
    for correction, losses in zip(CORRECTIONS, result.losses, strict=True):
        print(f"{correction} bias correction, by learning rate")
        print(f"{'decay':18}" + "".join(f"{rate:18g}" for rate in RATES))
        for name, of_rates in zip(result.names, losses, strict=True):
            cells = (f"{of.mean():.4f} ± {of.std(ddof=1):.4f}" for of in of_rates)
            print(f"{name:18}" + "".join(f"  {cell:>16}" for cell in cells))
        print()
    for correction, (constant, *others) in zip(CORRECTIONS, result.compared, strict=True):
        title = f"{correction} bias correction, at best rate"
        print(f"{title:37}  loss    above the best constant")
        print(f"{constant.name:18}  {constant.rate:17g}  {np.mean(constant.losses):.4f}")
        for one in others:
            away, error = difference(one, constant)
            figures = f"{np.mean(one.losses):.4f}  {away:+.4f} ± {error:.4f}"
            print(f"{one.name:18}  {one.rate:17g}  {figures}")
        print()


def draw(result: Result, out: Path) -> None:
    with picture(out, height=6.2) as figure:
        rows = figure.add_gridspec(2, 2, height_ratios=(4, 3))
        by_decay = [figure.add_subplot(rows[0, 0])]
        by_decay.append(figure.add_subplot(rows[0, 1], sharey=by_decay[0]))
        places = np.arange(len(CONSTANTS))
        for axes, correction, losses in zip(by_decay, CORRECTIONS, result.losses, strict=True):
            for i, rate in enumerate(RATES):
                of_rate = losses[: len(CONSTANTS), i]
                axes.errorbar(
                    places + 0.08 * (i - 1.5),
                    of_rate.mean(axis=-1),
                    of_rate.std(axis=-1, ddof=1),
                    marker="os^D"[i],
                    markersize=4,
                    elinewidth=1,
                    label=f"η = {rate:g}",
                )
            axes.set_xticks(places, [f"{decay:g}" for decay in CONSTANTS])
            axes.set(xlabel="constant decay", title=f"{correction.lower()} bias correction")
        by_decay[0].set(ylabel="training loss, last quarter", ylim=(0, None))
        by_decay[0].legend(loc="lower left", ncols=2)
        by_decay[1].tick_params(labelleft=False)

        compared = figure.add_subplot(rows[1, :])
        for i, (constant, *others) in enumerate(result.compared):
            away, errors = np.transpose([difference(one, constant) for one in others])
            compared.errorbar(
                away,
                np.arange(len(others)) + 0.25 * i,
                xerr=errors,
                fmt="os"[i],
                capsize=3,
                label=f"{CORRECTIONS[i].lower()} bias correction, above decay {constant.name}",
            )
        compared.axvline(0, color="black", linewidth=1)
        compared.set_yticks(np.arange(len(others)) + 0.125, [one.name for one in others])
        compared.set(xlabel="loss above that of the best constant decay", ylabel="decay")
        compared.invert_yaxis()
        compared.legend(loc="lower right")


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=24, help="half of them to choose the rate on")
    parser.add_argument("--out", type=Path, default=Path("out/adaptive_decay.png"))
    args = parser.parse_args(argv)

    x, y = data(seed=0)
    if args.epochs < 1 or args.seeds < 4 or args.seeds % 2 or not 1 <= args.batch <= len(x):
        parser.error(
            f"--epochs must be at least 1, --seeds 4 or more and even, --batch from 1 to {len(x)}"
        )
    seeds = range(args.seeds)
    batches = np.stack([epochs_of_batches(len(x), args.epochs, args.batch, s) for s in seeds])
    steps = batches.shape[1]
    constants = [f"{decay:g}" for decay in CONSTANTS]
    scheduled = schedules(steps)
    names = [*constants, *scheduled]
    rows = [*(np.full(steps, decay) for decay in CONSTANTS), *scheduled.values()]
    decays = np.asarray(rows, np.float32)

    bar = tqdm((False, True), desc=f"{len(names) * len(RATES) * args.seeds} networks at once")
    losses = np.stack([final_losses(decays, seeds, batches, x, y, on) for on in bar])
    compared = []
    for of in losses:
        bests = [best(constants, of[: len(constants)])]
        for i, name in enumerate(names):
            if name == "0.9" or name in scheduled:
                bests.append(best([name], of[i : i + 1]))
        compared.append(bests)
    result = Result(names, losses, compared)

    draw(result, args.out)
    print(f"Training loss after {steps} steps: mean ± deviation over {args.seeds} networks\n")
    print_tables(result)
    print(f"The last two tables are of {args.seeds // 2} networks. Curves in {args.out}")
    return result


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"adaptive_decay.py: {error}") from None
