"""Parameters in bfloat16 stall; with master weights they train like float32.

    python examples/bfloat16.py                 # a little over a minute on two cores
    python examples/bfloat16.py --rates 5e-3    # without choosing the learning rate

A bfloat16 number and its neighbours are 1/256 to 1/128 of its size apart. A step smaller than half
of that does not move the parameter at all, whatever the optimizer, and nothing reports it. Once the
learning rate is small, this happens to most parameters. `low_memory.master_weights` keeps the
difference between a parameter and its master weight in 2 bytes, 1 or none, so that small steps add
up.

A network with one wide hidden layer, in Flax NNX, learns the noise of an airfoil. Every method
starts from the same float32 parameters and sees the same batches. All but the first round the
parameters to bfloat16, and compute the network and its gradients in bfloat16. Learning rates fall
linearly to zero. The initial rate is the one with the lowest training loss in float32, averaged
over the seeds.

Prints the training losses of this choice. Then, for each method, prints the final mean squared
errors in units of the target's variance, as mean and range over the seeds; the share of nonzero
updates that moved no parameter; and the bytes of parameters, corrections and state. Draws the
training losses and these shares.

Sources: Micikevicius et al., "Mixed precision training", arXiv:1710.03740, 2018 (master weights);
Brooks, Pope and Marcolini, "Airfoil self-noise and prediction", NASA RP-1218, 1989 (the data).
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import label_ends, picture
import real_data
from rmsprop_jax import low_memory, rmsprop

Training = tuple[nnx.State, Any]  # parameters and optimizer state

EVERY = 250  # steps between points
WIDTH = 1024


class Method(NamedTuple):
    """The dtype of the parameters, and a function from a learning rate to a transformation."""

    dtype: Any
    make: Callable[[Any], optax.GradientTransformation]


def with_master_weights(bits: int, storage: Any = None) -> Method:
    def make(rate: Any) -> optax.GradientTransformation:
        return low_memory.master_weights(rmsprop(rate, storage=storage), bits)

    return Method(jnp.bfloat16, make)


METHODS = {
    "float32": Method(jnp.float32, rmsprop),
    "bfloat16": Method(jnp.bfloat16, rmsprop),
    "master weights of 16 bits": with_master_weights(16),
    "master weights of 24 bits": with_master_weights(24),
    "master weights of 32 bits": with_master_weights(32),
    # By default q8 skips leaves of fewer than 4096 elements, some of which this network has.
    "24 bits, and state in 8": with_master_weights(24, low_memory.q8(min_size=WIDTH)),
}


class Data(NamedTuple):
    """Inputs (n, 5) and targets (n,), for training and for testing."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def data() -> Data:
    """The rows, a fifth for testing, standardized by mean and deviation of the training rows."""
    rows = np.random.default_rng(0).permutation(real_data.airfoil())
    n = len(rows) * 4 // 5
    rows = (rows - rows[:n].mean(axis=0)) / rows[:n].std(axis=0)
    x, y = jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, -1])
    return Data(x[:n], y[:n], x[n:], y[n:])


class Net(nnx.Module):
    """One wide hidden layer; parameters and arithmetic are in `dtype`, predictions in float32."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.hidden = linear(5, WIDTH)
        self.out = linear(WIDTH, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (rows, 5) to (rows,)."""
        return self.out(nnx.relu(self.hidden(x)))[:, 0].astype(jnp.float32)


def network(dtype: Any, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A network whose parameters are made in float32, then rounded to `dtype`."""
    graph, _ = nnx.split(Net(dtype, nnx.Rngs(seed)))
    _, params = nnx.split(Net(jnp.float32, nnx.Rngs(seed)))
    return graph, jax.tree.map(lambda p: p.astype(dtype), params)


def mse(net: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(net(x) - y))


def count(masks: Any) -> jax.Array:
    return sum(map(jnp.sum, jax.tree.leaves(masks)), jnp.zeros([], jnp.int32))


@functools.partial(jax.jit, static_argnames=("graph", "method"), donate_argnames="training")
def train_batches(
    graph: nnx.GraphDef, method: Method, training: Training, rates: Any, rows: Any, data: Data
) -> tuple[Training, tuple[jax.Array, jax.Array, jax.Array]]:
    """Makes a step for each batch.

    Returns the training and test loss after the last one, and the share of updates that moved
    nothing.
    """

    def loss(params: nnx.State, x: jax.Array, y: jax.Array) -> jax.Array:
        return mse(nnx.merge(graph, params), x, y)

    def step(training: Training, at: tuple[Any, Any]) -> tuple[Training, Any]:
        params, state = training
        rate, rows = at
        grads = jax.grad(loss)(params, data.x[rows], data.y[rows])
        updates, state = method.make(rate).update(grads, state, params)
        moved = optax.apply_updates(params, updates)
        lost = jax.tree.map(lambda u, p, new: (u != 0) & (new == p), updates, params, moved)
        some = jax.tree.map(lambda u: u != 0, updates)
        return (moved, state), (count(lost), count(some))

    training, (lost, some) = lax.scan(step, training, (rates, rows))
    losses = loss(training[0], data.x, data.y), loss(training[0], data.x_test, data.y_test)
    return training, (*losses, lost.sum() / some.sum())


class Run(NamedTuple):
    """The results of one network, at every EVERY steps.

    Training and test losses and the share of updates that moved nothing; and `size`, the bytes of
    parameters, corrections and state per parameter.
    """

    losses: list[float]
    test_losses: list[float]
    lost: list[float]
    size: float


def train(
    method: Method, rate: float, data: Data, batches: NDArray[np.int64], seed: int, bar: Any = None
) -> Run:
    """Trains a network, one step per batch, at rates that fall from `rate` to zero."""
    graph, params = network(method.dtype, seed)
    training = params, method.make(0.0).init(params)
    held = sum(array.nbytes for array in jax.tree.leaves(training))
    size = held / sum(p.size for p in jax.tree.leaves(params))

    rates = (rate * np.linspace(1, 0, len(batches), endpoint=False)).astype(np.float32)
    points = []
    for first in range(0, len(batches), EVERY):
        some = slice(first, first + EVERY)
        training, point = train_batches(graph, method, training, rates[some], batches[some], data)
        points.append([float(value) for value in point])
        if bar is not None:
            bar.update(EVERY)
    losses, test_losses, lost = map(list, zip(*points, strict=True))
    return Run(losses, test_losses, lost, size)


def batches_of(rows: int, size: int, steps: int, seed: int) -> NDArray[np.int64]:
    """Row numbers, shuffled for each epoch; an incomplete last batch is dropped."""
    rng = np.random.default_rng(seed)
    n = rows // size
    orders = [rng.permutation(rows)[: n * size].reshape(n, size) for _ in range(-(-steps // n))]
    return np.concatenate(orders)[:steps]


def last(runs: Sequence[Run]) -> float:
    """The final training loss, averaged over the seeds."""
    return float(np.mean([run.losses[-1] for run in runs]))


def lowest(choice: dict[float, float]) -> float:
    """The rate with the lowest loss; a rate that diverged is returned only if all did."""
    return min(choice, key=lambda rate: np.nan_to_num(choice[rate], nan=np.inf))


class Result(NamedTuple):
    """The training loss of float32 by rate, the chosen rate, and each method's run per seed."""

    choice: dict[float, float]
    rate: float
    runs: dict[str, list[Run]]


def print_tables(result: Result) -> None:
    print("Training loss of float32, by initial learning rate")
    print("  ".join(f"{rate:g}: {loss:.4f}" for rate, loss in result.choice.items()))

    def cell(values: Sequence[float]) -> str:
        return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"

    print(f"\nAt {result.rate:g}: mean over the seeds, and range")
    heads = f"{'training loss':>25}  {'test loss':>25}  lost updates  bytes per parameter"
    print(f"{'':25}  {heads}")
    for name, runs in result.runs.items():
        losses = cell([run.losses[-1] for run in runs])
        test = cell([run.test_losses[-1] for run in runs])
        lost = np.mean([run.lost for run in runs])
        print(f"{name:25}  {losses:>25}  {test:>25}  {lost:12.1%}  {runs[0].size:19.2f}")


def draw(result: Result, out: Path) -> None:
    with picture(out, height=6) as figure:
        loss, lost = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for i, (name, runs) in enumerate(result.runs.items()):
            steps = EVERY * np.arange(1, len(runs[0].losses) + 1)
            # The curves overlap: the first is drawn wide, and each has its markers at other steps.
            look: dict[str, Any] = {"marker": "ohsv^D"[i], "markevery": (i, len(METHODS))}
            look |= {"linewidth": 1.4 if i else 5, "alpha": 1 if i else 0.4}
            losses = np.mean([run.losses for run in runs], axis=0)
            label = f"{name}: {losses[-1]:.4f}"
            loss.plot(steps, losses, **look, label=label)
            lost.plot(steps, np.mean([run.lost for run in runs], axis=0), **look)
        reached = [loss for loss in map(last, result.runs.values()) if np.isfinite(loss)]
        if reached:  # cuts off the first steps, where the methods hardly differ
            loss.set_ylim(0.9 * min(reached), 3 * min(reached))
        loss.set(ylabel="training loss, mean of the seeds")
        label_ends(loss)
        lost.set(xlabel="step", ylabel="updates that\nmoved nothing", ylim=(-0.02, 1.02))
        lost.yaxis.set_major_formatter("{x:.0%}")


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=(1e-3, 3e-3, 1e-2), help="initial ones"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of networks per method")
    parser.add_argument("--out", type=Path, default=Path("out/bfloat16.png"))
    args = parser.parse_args(argv)

    rows, rates = data(), sorted(set(args.rates))
    n = len(rows.x)
    if args.steps < 1 or args.steps % EVERY:
        parser.error(f"--steps must be a positive multiple of {EVERY}")
    if args.seeds < 1 or not 1 <= args.batch <= n:
        parser.error(f"--seeds must be at least 1, --batch from 1 to {n}")
    if not all(0 < rate < np.inf for rate in rates):
        parser.error("--rates must be positive numbers")
    batches = [batches_of(n, args.batch, args.steps, seed) for seed in range(args.seeds)]

    with tqdm(unit="step", total=(len(rates) + len(METHODS) - 1) * args.seeds * args.steps) as bar:

        def trained(name: str, rate: float) -> list[Run]:
            bar.set_description(f"{name}, {rate:g}")
            method = METHODS[name]
            return [train(method, rate, rows, b, seed, bar) for seed, b in enumerate(batches)]

        of_rates = {rate: trained("float32", rate) for rate in rates}
        choice = {rate: last(runs) for rate, runs in of_rates.items()}
        rate = lowest(choice)
        others = {name: trained(name, rate) for name in METHODS if name != "float32"}
    result = Result(choice, rate, {"float32": of_rates[rate], **others})

    draw(result, args.out)
    print_tables(result)
    print(f"\nCurves in {args.out}")
    return result


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"bfloat16.py: {error}") from None
