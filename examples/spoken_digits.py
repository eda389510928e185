"""Speech: a small network recognizes ten spoken digits, from 600 recordings of six speakers.

    python examples/spoken_digits.py              # three networks from three seeds
    python examples/spoken_digits.py --seeds 1    # one

JAX turns each recording into a log-mel spectrogram: the power spectrum in windows of 32 ms, one
every 16 ms, summed into 32 bands of equal width in mel, a scale of perceived pitch; then the
logarithm, standardized over the training recordings. Three convolutions along time read it, in Flax
NNX. RMSProp has momentum, and a learning rate that falls to zero along a cosine.

Prints the accuracy of each network on 300 other recordings by the same speakers, and the mean of
these. Draws the spectrograms of ten digits, the training losses, and the test errors after each
epoch.

The data: Jackson, Souza, Flaks, Pan, Nicolas and Thite, "Free Spoken Digit Dataset", version
1.0.10, CC BY-SA 4.0, https://github.com/Jakobovski/free-spoken-digit-dataset; the first 15
recordings of each digit by each speaker are used.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import label_ends, picture
import real_data
from rmsprop_jax import rmsprop

Array = NDArray[np.float32]

RATE = 8000  # samples per second
LENGTH = 8192  # samples; 99% of the recordings are shorter
WINDOW, HOP = 256, 128  # samples
BANDS = 32
TICKS = (1, 2, 5, 10, 20, 50, 100)  # %


def mel_filters() -> Array:
    """Triangular filters with peaks of 1 over a spectrum's frequencies, (frequencies, bands).

    Each starts and ends where its neighbours peak; the peaks are equally spaced in mel.
    """
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    frequency = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising, falling = (frequency - low) / (peak - low), (high - frequency) / (high - peak)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


@jax.jit
def log_mel(samples: jax.Array) -> jax.Array:
    """From (recordings, LENGTH), within -1 to 1, to (recordings, windows, BANDS)."""
    starts = np.arange(0, LENGTH - WINDOW + 1, HOP)
    windows = samples[:, starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW + 1)[:-1]
    power = jnp.square(jnp.abs(jnp.fft.rfft(windows)))
    return jnp.log(power @ mel_filters() + 1e-6)


def pad(recordings: Sequence[NDArray[np.int16]]) -> Array:
    """The recordings at the same LENGTH: cut, or padded with silence."""
    padded = np.zeros((len(recordings), LENGTH), np.float32)
    for row, samples in zip(padded, recordings, strict=True):
        row[: len(samples)] = samples[:LENGTH] / 32768
    return padded


class Pictures(NamedTuple):
    """Log-mel spectrograms (n, windows, BANDS) and labels (n,), to train on and to test on."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def data() -> Pictures:
    digits = real_data.spoken_digits()
    x, x_test = log_mel(pad(digits.recordings)), log_mel(pad(digits.test_recordings))
    mean, deviation = x.mean(axis=(0, 1)), x.std(axis=(0, 1))
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    return Pictures(x, jnp.asarray(digits.labels), x_test, jnp.asarray(digits.test_labels))


class Net(nnx.Module):
    """Three convolutions along time, then the maximum and the mean of each channel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(BANDS, 64, 5, rngs=rngs)
        self.conv2 = nnx.Conv(64, 64, 5, strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, 5, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (pictures, windows, BANDS) to (pictures, 10)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.out(jnp.concatenate([x.max(axis=1), x.mean(axis=1)], axis=1))


def cross_entropy(net: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()


@nnx.jit(donate_argnames=("net", "optimizer"))
def train_step(net: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Makes one step, and returns the loss before it."""
    loss, grads = nnx.value_and_grad(cross_entropy)(net, x, y)
    optimizer.update(net, grads)
    return loss


@nnx.jit
def accuracy(net: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(net(x).argmax(axis=1) == y)


class Run(NamedTuple):
    """The mean training loss of each epoch, and the test accuracy after it."""

    losses: list[float]
    accuracies: list[float]


def train(
    tx: optax.GradientTransformation, pictures: Pictures, epochs: int, batch: int, seed: int
) -> Run:
    """Trains a network; recordings are shuffled for each epoch, an incomplete batch is dropped."""
    net = Net(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    run = Run([], [])
    for _ in tqdm(range(epochs), desc=f"seed {seed}", unit="epoch"):
        order = rng.permutation(len(pictures.x))[: len(pictures.x) // batch * batch]
        losses = [
            train_step(net, optimizer, pictures.x[rows], pictures.y[rows])
            for rows in order.reshape(-1, batch)
        ]
        run.losses.append(float(np.mean(losses)))
        run.accuracies.append(float(accuracy(net, pictures.x_test, pictures.y_test)))
    return run


def draw(pictures: Pictures, runs: Sequence[Run], out: Path) -> None:
    with picture(out, height=5.8) as figure:
        halves = figure.add_gridspec(2, height_ratios=(2, 3))
        above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        for digit, axes in enumerate(above.subplots(2, 5, sharex=True, sharey=True).flat):
            axes.imshow(
                pictures.x_test[jnp.argmax(pictures.y_test == digit)].T,  # the first one
                origin="lower",
                aspect="auto",
                extent=(0, LENGTH / RATE, 0.5, BANDS + 0.5),
                vmin=pictures.x_test.min(),
                vmax=pictures.x_test.max(),
            )
            axes.grid(visible=False)
            axes.text(
                0.94, 0.9, digit, color="white", ha="right", va="top", transform=axes.transAxes
            )
        above.supxlabel("seconds", fontsize="medium")
        above.supylabel("mel band", fontsize="medium")
        loss, wrong = below.subplots(1, 2)
        for seed, run in enumerate(runs):
            epochs = range(1, len(run.losses) + 1)
            loss.semilogy(epochs, run.losses)
            last = 100 * (1 - run.accuracies[-1])
            label = f"seed {seed}: {last:.1f}%"
            wrong.semilogy(epochs, 100 * (1 - np.array(run.accuracies)), label=label)
        loss.set(xlabel="epoch", ylabel="training loss")
        wrong.set(xlabel="epoch", ylabel="test error")
        wrong.set_yticks(TICKS, [f"{tick}%" for tick in TICKS])
        wrong.minorticks_off()
        label_ends(wrong)


def main(argv: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="initial one")
    parser.add_argument("--decay", type=float, default=0.99)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3, help="number of networks")
    parser.add_argument("--out", type=Path, default=Path("out/spoken_digits.png"))
    args = parser.parse_args(argv)

    pictures = data()
    train_size = len(pictures.x)
    if args.epochs < 1 or args.seeds < 1 or not 1 <= args.batch <= train_size:
        parser.error(f"--epochs and --seeds must be at least 1, --batch from 1 to {train_size}")
    steps = args.epochs * (train_size // args.batch)
    rate = optax.cosine_decay_schedule(args.learning_rate, steps)
    tx = rmsprop(rate, args.decay, momentum=args.momentum)

    runs = [train(tx, pictures, args.epochs, args.batch, seed) for seed in range(args.seeds)]

    draw(pictures, runs, args.out)
    last = [run.accuracies[-1] for run in runs]
    for seed, of_seed in enumerate(last):
        print(f"Seed {seed}, test accuracy {of_seed:.4f}")
    print(
        f"Mean test accuracy {np.mean(last):.4f} on {len(pictures.x_test)} recordings, "
        f"curves in {args.out}"
    )
    return runs


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"spoken_digits.py: {error}") from None
