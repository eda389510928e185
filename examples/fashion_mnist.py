"""Fashion-MNIST: how accuracy depends on the learning rate, for RMSProp and other methods.

    python examples/fashion_mnist.py                             # 13 learning rates
    python examples/fashion_mnist.py --rates 1e-3 3e-3 --epochs 5

A network with one hidden layer, the MLP, is trained at every learning rate from several seeds; for
each method, one compiled program trains all of these at once. The rate with the best accuracy on
10,000 held-out training pictures is then used to train a small convolutional network, the CNN. Both
are in Flax NNX. The test pictures are used only after the CNNs are trained. RMSProp takes part
twice: at constant rates, like the other methods, and at rates that fall linearly to zero.

Prints the accuracy and loss of the MLP on the held-out pictures at every rate; and, for each
method, the best rate, the rates whose accuracy is within 0.01 of it, and the accuracies of the CNN.
Draws these, and the training loss of the CNN. The CNN is trained once per method: at constant
rates, other seeds change its accuracy by about 0.01, so smaller differences between the CNNs mean
nothing.

Trying RMSProp on Fashion-MNIST with several learning rate schedules is an exercise in section 12.8,
"RMSProp", of Zhang, Lipton, Li and Smola, Dive into Deep Learning. The data: Xiao, Rasul and
Vollgraf, "Fashion-MNIST", arXiv:1708.07747, 2017.
"""

import argparse
from collections.abc import Callable, Sequence
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
from rmsprop_jax import rmsprop

Rows = NDArray[np.int64]
Figures = NDArray[np.float32]
Method = Callable[[Any, int], optax.GradientTransformation]  # of learning rate and steps

METHODS: dict[str, Method] = {
    "RMSProp": lambda rate, _: rmsprop(rate),
    "RMSProp (falling)": lambda rate, steps: rmsprop(optax.linear_schedule(rate, 0.0, steps)),
    "Adam": lambda rate, _: optax.adam(rate),
    "Adagrad": lambda rate, _: optax.adagrad(rate),
    "SGD": lambda rate, _: optax.sgd(rate),
}
STYLES: dict[str, dict[str, Any]] = {
    "RMSProp": {"color": "C0", "linestyle": "-", "marker": "o"},
    "RMSProp (falling)": {"color": "C5", "linestyle": "--", "marker": "s"},
    "Adam": {"color": "C1", "linestyle": "--", "marker": "^"},
    "Adagrad": {"color": "C2", "linestyle": "-.", "marker": "D"},
    "SGD": {"color": "C3", "linestyle": ":", "marker": "v"},
}
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CLOSE = 0.01  # largest distance from the best accuracy


class Pictures(NamedTuple):
    """Pictures (n, 28, 28) and labels (n,): to train on, held out to choose on, and to test on."""

    x: jax.Array
    y: jax.Array
    x_held: jax.Array
    y_held: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def data() -> Pictures:
    """The last sixth of the training pictures is held out."""
    x, y, x_test, y_test = map(jnp.asarray, real_data.fashion_mnist())
    n = len(x) * 5 // 6
    return Pictures(x[:n], y[:n], x[n:], y[n:], x_test, y_test)


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(28 * 28, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (pictures, 28, 28), 0 to 255, to (pictures, 10)."""
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1) / 255)))


class CNN(nnx.Module):
    """Two convolutions, each of which halves the size of the picture, and a hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(7 * 7 * 32, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (pictures, 28, 28), 0 to 255, to (pictures, 10)."""
        x = nnx.relu(self.conv1(x[..., None] / 255))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def cross_entropy(net: MLP | CNN, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()


@nnx.jit
def accuracy(net: MLP | CNN, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(net(x).argmax(axis=1) == y)


def batches_of(rows: int, epochs: int, size: int, seed: int) -> Rows:
    """Row numbers, shuffled for each epoch; an incomplete last batch is dropped."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(rows)[: rows // size * size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, size)


class Sweep(NamedTuple):
    """Loss and accuracy on the held-out pictures, for each learning rate and seed."""

    losses: Figures
    accuracies: Figures

    def best(self) -> int:
        """The index of the rate with the highest mean accuracy; a network with NaN only guesses."""
        return int(self.accuracies.mean(axis=1).argmax())

    def close(self) -> list[int]:
        """The indices of the rates whose mean accuracy is at most CLOSE below the highest."""
        means = self.accuracies.mean(axis=1)
        return np.flatnonzero(means >= means.max() - CLOSE).tolist()


def sweep(
    method: Method, rates: Sequence[float], pictures: Pictures, epochs: int, size: int, seeds: int
) -> Sweep:
    """Trains an MLP at every rate from every seed, all in one program."""
    batches = np.stack([batches_of(len(pictures.x), epochs, size, s) for s in range(seeds)])

    def trained(rate: jax.Array, seed: jax.Array, batches: jax.Array, pictures: Pictures) -> Any:
        graphdef, params = nnx.split(MLP(nnx.Rngs(jax.random.key(seed))), nnx.Param)
        tx = method(rate, len(batches))

        def loss(params: Any, rows: jax.Array) -> jax.Array:
            return cross_entropy(nnx.merge(graphdef, params), pictures.x[rows], pictures.y[rows])

        def step(run: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
            params, state = run
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = lax.scan(step, (params, tx.init(params)), batches)
        net, held = nnx.merge(graphdef, params), (pictures.x_held, pictures.y_held)
        return cross_entropy(net, *held), accuracy(net, *held)

    of_seeds = jax.vmap(trained, (None, 0, 0, None))
    of_rates = jax.jit(jax.vmap(of_seeds, (0, None, None, None)))
    scores = of_rates(np.asarray(rates, np.float32), np.arange(seeds), batches, pictures)
    return Sweep(*jax.device_get(scores))


@nnx.jit(donate_argnames=("net", "optimizer"))
def train_step(net: CNN, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Makes one step, and returns the loss before it."""
    loss, grads = nnx.value_and_grad(cross_entropy)(net, x, y)
    optimizer.update(net, grads)
    return loss


class Run(NamedTuple):
    """The learning rate of a CNN, its training loss at each step, and its final accuracies."""

    rate: float
    losses: list[float]
    held_accuracy: float
    test_accuracy: float


def train(name: str, rate: float, pictures: Pictures, epochs: int, size: int, seed: int = 0) -> Run:
    """Trains a CNN with the method of this name."""
    batches = batches_of(len(pictures.x), epochs, size, seed)
    net = CNN(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(net, METHODS[name](rate, len(batches)), wrt=nnx.Param)
    losses = [
        train_step(net, optimizer, pictures.x[rows], pictures.y[rows])
        for rows in tqdm(batches, desc=f"CNN, {name}", unit="step")
    ]
    return Run(
        rate,
        [float(loss) for loss in losses],
        float(accuracy(net, pictures.x_held, pictures.y_held)),
        float(accuracy(net, pictures.x_test, pictures.y_test)),
    )


class Result(NamedTuple):
    """The learning rates; by method, the MLPs at all of them and the CNN at the best."""

    rates: list[float]
    sweeps: dict[str, Sweep]
    runs: dict[str, Run]


def print_tables(result: Result) -> None:
    print(f"{'rate':8}" + "".join(f"{name:>19}" for name in result.sweeps))
    for i, rate in enumerate(result.rates):
        cells = (
            f"{of.accuracies[i].mean():.4f} {of.losses[i].mean():.4f}"
            for of in result.sweeps.values()
        )
        print(f"{rate:<8g}" + "".join(f"{cell:>19}" for cell in cells))
    print(f"\n{'method':17}  best rate  MLP held out     within {CLOSE}  CNN held out  CNN test")
    for name, of in result.sweeps.items():
        run, close = result.runs[name], of.close()
        within = f"{result.rates[close[0]]:g} to {result.rates[close[-1]]:g}"
        mlp = f"{run.rate:9g}  {of.accuracies[of.best()].mean():12.4f}  {within:>14}"
        print(f"{name:17}  {mlp}  {run.held_accuracy:12.4f}  {run.test_accuracy:8.4f}")


def draw(result: Result, epochs: int, out: Path) -> None:
    with picture(out, height=7) as figure:
        halves = figure.add_gridspec(2)
        above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        correct, loss = above.subplots(1, 2)
        curves = below.subplots()
        for name, of in result.sweeps.items():
            run, look = result.runs[name], STYLES[name]
            correct.plot(result.rates, of.accuracies.mean(axis=1), **look, label=name)
            loss.plot(result.rates, of.losses.mean(axis=1), **look)
            parts = np.array_split(run.losses, min(10 * epochs, len(run.losses)))
            ends = np.linspace(0, epochs, len(parts) + 1)[1:]
            label = f"{name}: {run.test_accuracy:.4f}"
            curves.plot(ends, [part.mean() for part in parts], **look, label=label)
        correct.set(ylabel="MLP, accuracy on held-out pictures", ylim=(0.6, 0.9))
        loss.set(ylabel="MLP, loss on held-out pictures", ylim=(0.3, 1.2))
        for axes in (correct, loss):
            axes.set(xscale="log", xlabel="learning rate η")
        curves.set(xlabel="epoch", ylabel="CNN, training loss", ylim=(0, 1))
        curves.set_title("at the best rate of each method, with the test accuracy")
        label_ends(curves)
        above.legend(*correct.get_legend_handles_labels(), loc="outside upper center", ncols=5)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of MLP and CNN")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="rates to try")
    parser.add_argument("--seeds", type=int, default=3, help="number of MLPs per rate")
    parser.add_argument("--out", type=Path, default=Path("out/fashion_mnist.png"))
    args = parser.parse_args(argv)

    pictures, rates = data(), sorted(set(args.rates))
    n = len(pictures.x)
    if args.epochs < 1 or args.seeds < 1 or not 1 <= args.batch <= n:
        parser.error(f"--epochs and --seeds must be at least 1, --batch from 1 to {n}")
    if not all(0 < rate < np.inf for rate in rates):
        parser.error("--rates must be positive numbers")
    bar = tqdm(METHODS, desc=f"{len(rates) * args.seeds} MLPs at once", unit="method")
    each = args.epochs, args.batch
    sweeps = {name: sweep(METHODS[name], rates, pictures, *each, args.seeds) for name in bar}
    runs = {name: train(name, rates[of.best()], pictures, *each) for name, of in sweeps.items()}
    result = Result(rates, sweeps, runs)

    draw(result, args.epochs, args.out)
    print("Accuracy and loss of the MLP on the held-out pictures, averaged over the seeds\n")
    print_tables(result)
    best = max(runs, key=lambda name: runs[name].test_accuracy)
    print(
        f"\nBest test accuracy {runs[best].test_accuracy:.4f} on {len(pictures.x_test)} pictures, "
        f"by {best}; curves in {args.out}"
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"fashion_mnist.py: {error}") from None
