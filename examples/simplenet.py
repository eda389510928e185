"""A small network trained with RMSProp in Flax NNX: Linear(50), ReLU, Linear(1), squared error.

    python examples/simplenet.py                   # 100 random samples, as a full batch
    python examples/simplenet.py --data airfoil    # 1503 measurements of wing noise, in batches

Prints the loss of each epoch, as `Epoch [1/10], Loss: 1.3661`. Ends with the first and last loss
or, on real data, with the loss on held-out rows. Draws the losses; on real data, also the losses on
held-out rows and that of a linear model. The whole step (loss, gradients, update) is one compiled
function, which reuses the memory of the arrays that it replaces.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from drawing import label_ends, picture
import real_data
from rmsprop_jax import rmsprop

Rows = NDArray[np.float32]


class SimpleNet(nnx.Module):
    """One hidden layer of 50 units."""

    def __init__(self, inputs: int, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(inputs, 50, rngs=rngs)
        self.fc2 = nnx.Linear(50, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (rows, inputs) to (rows, 1)."""
        return self.fc2(nnx.relu(self.fc1(x)))


def mse(model: SimpleNet, x: ArrayLike, y: ArrayLike) -> jax.Array:
    return jnp.mean(jnp.square(model(jnp.asarray(x)) - y))


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: SimpleNet, optimizer: nnx.Optimizer, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Makes one step, and returns the loss before it."""
    loss, grads = nnx.value_and_grad(mse)(model, x, y)
    optimizer.update(model, grads)
    return loss


def train(
    model: SimpleNet,
    optimizer: nnx.Optimizer,
    x: Rows,
    y: Rows,
    epochs: int,
    batch: int,
    seed: int,
    held_out: tuple[Rows, Rows] | None = None,
) -> tuple[list[float], list[float]]:
    """The mean loss of each epoch, and the loss after it on held-out rows, if there are any."""
    rng = np.random.default_rng(seed)
    losses, test_losses = [], []
    # A full batch is done before a bar could be drawn.
    for epoch in tqdm(range(epochs), unit="epoch", disable=batch == len(x)):
        steps = [train_step(model, optimizer, *rows) for rows in batches(x, y, batch, rng)]
        losses.append(float(np.mean(steps)))
        if held_out is not None:
            test_losses.append(float(mse(model, *held_out)))
        tqdm.write(f"Epoch [{epoch + 1}/{epochs}], Loss: {losses[-1]:.4f}")
    return losses, test_losses


def batches(x: Rows, y: Rows, size: int, rng: np.random.Generator) -> Iterator[tuple[Rows, Rows]]:
    """The rows in random order; an incomplete batch is dropped, as its shape would recompile."""
    order = rng.permutation(len(x))[: len(x) // size * size]
    for rows in order.reshape(-1, size):
        yield x[rows], y[rows]


def random_samples(seed: int) -> tuple[Rows, Rows]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((100, 10), dtype=np.float32),
        rng.standard_normal((100, 1), dtype=np.float32),
    )


def airfoil(seed: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Training inputs and targets, then test ones; the training rows standardize all of them."""
    rows = np.random.default_rng(seed).permutation(real_data.airfoil())
    train, test = np.split(rows, [len(rows) * 4 // 5])
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    return train[:, :-1], train[:, -1:], test[:, :-1], test[:, -1:]


def linear_loss(x: Rows, y: Rows, x_test: Rows, y_test: Rows) -> float:
    """The test loss of the best linear model of the training rows, whose means are 0."""
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(np.mean((x_test @ slopes - y_test) ** 2))


class Result(NamedTuple):
    """The losses of each epoch; there are test losses on real data only."""

    losses: list[float]
    test_losses: list[float]


def draw(result: Result, line: float | None, out: Path) -> None:
    """Draws the losses, and the test loss of a linear model, if there is one."""
    with picture(out, height=4) as figure:
        axes = figure.subplots()
        epochs = range(1, len(result.losses) + 1)
        axes.plot(epochs, result.losses, marker="o", label="training loss")
        if line is not None:
            last = result.test_losses[-1]
            axes.plot(epochs, result.test_losses, marker="s", label=f"test loss: {last:.3f}")
            level = [line] * len(epochs)
            axes.plot(epochs, level, "k:", label=f"test loss of\na linear model: {line:.3f}")
            axes.set(ylabel="mean squared error / variance")
        else:
            axes.set(ylabel="mean squared error")
        axes.set(xlabel="epoch", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        label_ends(axes)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["random", "airfoil"], default="random")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, help="default: all random samples, or 16 airfoil rows")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--eps-in-sqrt", action="store_true", help="default: outside, like PyTorch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/simplenet.png"))
    args = parser.parse_args(argv)

    held_out, line = None, None
    if args.data == "airfoil":
        x, y, x_test, y_test = airfoil(args.seed)
        held_out, line = (x_test, y_test), linear_loss(x, y, x_test, y_test)
    else:
        x, y = random_samples(args.seed)
    model = SimpleNet(x.shape[1], nnx.Rngs(args.seed))
    tx = rmsprop(args.learning_rate, args.decay, args.eps, eps_in_sqrt=args.eps_in_sqrt)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batch = args.batch
    if batch is None:
        batch = 16 if args.data == "airfoil" else len(x)
    if args.epochs < 1 or not 1 <= batch <= len(x):
        parser.error(f"--epochs must be at least 1, --batch from 1 to {len(x)}")

    result = Result(*train(model, optimizer, x, y, args.epochs, batch, args.seed, held_out))
    draw(result, line, args.out)
    if held_out is None:
        losses = result.losses
        print(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f}, curve in {args.out}")
    else:
        print(
            f"Test loss {result.test_losses[-1]:.4f} on {len(held_out[0])} held-out rows, "
            f"{line:.4f} for a linear model, curves in {args.out}"
        )
    return result


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"simplenet.py: {error}") from None
