"""A network learns to write like Shakespeare, character by character, with four optimizers.

    python examples/char_lstm.py              # about four minutes on two cores
    python examples/char_lstm.py --cosine     # learning rates that fall to zero
    python examples/char_lstm.py --steps 200  # shorter, and nearer to gibberish

An LSTM in Flax NNX reads a text in parallel streams and predicts each next character. It is trained
by truncated backpropagation through time: the carry of the LSTM continues from one window of a
stream to the next, but the gradient does not reach back beyond the start of a window.

RMSProp is said to do well on recurrent networks, though sometimes behind Adam; Adagrad is said to
slow down too much. This example measures them and SGD, all with gradients clipped to the same norm.
For each method the learning rate is chosen from five, by the perplexity on held-out text. Networks
from other seeds are then trained, and judged on another piece of held-out text. The perplexity is
exp of the mean cross entropy per character: 65 if all 65 characters seem equally likely.

Prints the perplexities of the choice; for the new networks, how far a step moves the parameters at
the start and at the end, and the perplexities; and some text written by the first network that
RMSProp trained. Draws the perplexities.

Sources: Hinton, Srivastava and Swersky, "Neural networks for machine learning", lecture 6e, 2012
(RMSProp); Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850, 2013
(LSTMs that learn text with its centered form); Williams and Peng, "An efficient gradient-based
algorithm for on-line training of recurrent network trajectories", Neural Computation 2, 1990
(truncated backpropagation). The data: Karpathy, https://github.com/karpathy/char-rnn.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
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

from drawing import picture
import real_data
from rmsprop_jax import rmsprop

Codes = NDArray[np.int32]
Carry = tuple[jax.Array, jax.Array]
Training = tuple[nnx.State, Any, Carry]  # parameters, optimizer state, carry

EMBEDDING = 32
CLIP = 1.0  # largest norm of a gradient
EVERY = 50  # steps between points
WRITTEN = 300  # characters
HELD_OUT_STREAMS = 64  # short ones, read in parallel


class Method(NamedTuple):
    """A function from a learning rate to a transformation, and the rates to choose from."""

    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]


METHODS = {
    "rmsprop": Method(lambda rate: rmsprop(rate, decay=0.95), (0.001, 0.003, 0.01, 0.03, 0.1)),
    "adam": Method(optax.adam, (0.001, 0.003, 0.01, 0.03, 0.1)),
    # Optax starts the sum at 0.1, far above the squared gradients here, which is close to SGD.
    "adagrad": Method(
        lambda rate: optax.adagrad(rate, initial_accumulator_value=0.0),
        (0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "sgd": Method(optax.sgd, (1.0, 3.0, 10.0, 30.0, 100.0)),
}


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(CLIP), tx)


class Net(nnx.Module):
    """From characters to the logits of the next ones."""

    def __init__(self, characters: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(characters, EMBEDDING, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(EMBEDDING, hidden, rngs=rngs), rngs=False)
        self.out = nnx.Linear(hidden, characters, rngs=rngs)

    def __call__(self, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        """From a carry and codes (streams, length) to the next carry and logits."""
        carry, hidden = self.lstm(self.embed(x), initial_carry=carry, return_carry=True)
        return carry, self.out(hidden)

    def no_memory(self, streams: int) -> Carry:
        """The carry before the first character."""
        zeros = jnp.zeros((streams, self.out.in_features))
        return zeros, zeros


class Windows(NamedTuple):
    """Codes `x` and the codes `y` that follow them, of shape (windows, streams, length)."""

    x: Any
    y: Any


def windows(codes: Codes, streams: int, length: int) -> Windows:
    """Cuts a text into streams and those into windows; an incomplete last window is dropped."""
    each = (len(codes) - 1) // streams // length * length

    def cut(codes: Codes) -> Codes:
        return codes[: streams * each].reshape(streams, -1, length).swapaxes(0, 1)

    return Windows(cut(codes), cut(codes[1:]))


class Text(NamedTuple):
    """The sorted characters, and the text in codes: 90% to train on, 5% and 5% held out."""

    characters: str
    train: Codes
    validation: Windows
    test: Windows


def data() -> Text:
    text = real_data.tiny_shakespeare()
    characters, codes = np.unique(list(text), return_inverse=True)
    cuts = [len(text) * 18 // 20, len(text) * 19 // 20]
    train, *held_out = np.split(codes.astype(np.int32), cuts)
    length = (len(held_out[0]) - 1) // HELD_OUT_STREAMS
    validation, test = (windows(part, HELD_OUT_STREAMS, length) for part in held_out)
    return Text("".join(characters), train, validation, test)


def cross_entropy(net: Net, carry: Carry, window: Windows) -> tuple[jax.Array, Carry]:
    """The mean over the characters of one window, in nats, and the next carry."""
    carry, logits = net(carry, window.x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, window.y).mean(), carry


@nnx.jit
def perplexity(net: Net, text: Windows) -> jax.Array:
    """The perplexity of a text that is a single window."""
    (x,), (y,) = text
    return jnp.exp(cross_entropy(net, net.no_memory(len(x)), Windows(x, y))[0])


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def train_windows(
    graph: nnx.GraphDef, method: Method, training: Training, rates: Any, text: Windows
) -> tuple[Training, tuple[jax.Array, jax.Array]]:
    """Makes a step for each window; returns the losses and the lengths of the steps."""

    def loss(params: nnx.State, carry: Carry, window: Windows) -> tuple[jax.Array, Carry]:
        return cross_entropy(nnx.merge(graph, params), carry, window)

    def step(training: Training, at: tuple[Any, Windows]) -> tuple[Training, Any]:
        params, state, carry = training
        rate, window = at
        # With respect to the parameters only: the carry is data, like the characters.
        (nats, carry), grads = jax.value_and_grad(loss, has_aux=True)(params, carry, window)
        updates, state = clipped(method.make(rate)).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, carry), (nats, optax.tree.norm(updates))

    return lax.scan(step, training, (rates, text))


def train(net: Net, method: Method, rates: Any, text: Windows) -> Iterator[tuple[Net, float]]:
    """Makes a step at each of the rates, starting the text again when it ends.

    Yields the network after every EVERY steps, and the mean length of those steps.
    """
    graph, params = nnx.split(net)
    training = params, clipped(method.make(0.0)).init(params), net.no_memory(text.x.shape[1])
    for first in range(0, len(rates), EVERY):
        steps = np.arange(first, first + EVERY)
        some = Windows(*(codes[steps % len(codes)] for codes in text))
        training, (_, moved) = train_windows(graph, method, training, rates[steps], some)
        yield nnx.merge(graph, training[0]), float(moved.mean())


def lowest(perplexities: Sequence[float]) -> int:
    """The index of the lowest; that of a run that diverged only if all did."""
    return int(np.argmin(np.nan_to_num(perplexities, nan=np.inf)))


@nnx.jit(static_argnames="length")
def write(net: Net, first: int, length: int, temperature: float, key: jax.Array) -> jax.Array:
    """The codes of a text that continues a first character, which is not part of it."""

    def step(before: tuple[Carry, jax.Array], key: jax.Array) -> tuple[Any, jax.Array]:
        carry, code = before
        carry, hidden = net.lstm.cell(carry, net.embed(code))
        code = jax.random.categorical(key, net.out(hidden) / temperature)
        return (carry, code), code

    start = (net.no_memory(1), jnp.array([first]))
    return lax.scan(step, start, jax.random.split(key, length))[1][:, 0]


class Run(NamedTuple):
    """The results of one method.

    `choice` has the validation perplexity at each of its rates, and `rate` is the best one. The
    other fields are of the new networks: validation perplexities and mean lengths of a step, both
    of shape (networks, points), and test perplexities.
    """

    choice: list[float]
    rate: float
    curves: NDArray[np.float64]
    lengths: NDArray[np.float64]
    test: list[float]


class Figures(NamedTuple):
    """The run of each method, and the text that a network wrote."""

    runs: dict[str, Run]
    written: str


def print_tables(runs: dict[str, Run], steps: int) -> None:
    print(f"Validation perplexity after {steps} steps, by learning rate")
    for name, run in runs.items():
        pairs = zip(METHODS[name].rates, run.choice, strict=True)
        print(f"{name:7}" + "".join(f"{rate:8g}:{value:6.4g}" for rate, value in pairs))
    print("\nNew networks: length of a step, validation perplexity, each network's test perplexity")
    print(f"{'':7}     rate first {EVERY}  last {EVERY}  halfway      end")
    for name, run in runs.items():
        curve, lengths = run.curves.mean(axis=0), run.lengths.mean(axis=0)
        means = (lengths[0], lengths[-1], curve[(len(curve) - 1) // 2], curve[-1])
        columns = "".join(f"{value:9.3f}" for value in means)
        test = ", ".join(f"{value:.3f}" for value in run.test)
        print(f"{name:7}{run.rate:9g}{columns}  {test}")


def draw(runs: dict[str, Run], out: Path) -> None:
    with picture(out, height=4) as figure:
        curves, choice = figure.subplots(1, 2, sharey=True)
        for name, run in runs.items():
            steps = EVERY * np.arange(1, run.curves.shape[1] + 1)
            curves.plot(steps, run.curves.mean(axis=0), label=f"{name}, η = {run.rate:g}")
            choice.plot(METHODS[name].rates, run.choice, marker="o")
        curves.set(xlabel="step", ylabel="validation perplexity")
        curves.set_title(f"new networks, mean of {len(run.curves)}")
        curves.legend()
        choice.set(xlabel="learning rate η", xscale="log", title=f"choice, after {steps[-1]} steps")
        reached = np.concatenate([run.choice for run in runs.values()])
        if np.isfinite(reached).any():  # cuts off runs that diverged
            best = np.min(reached[np.isfinite(reached)])
            choice.set_ylim(0.9 * best, 2.5 * best)


def main(argv: Sequence[str] | None = None) -> Figures:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cosine", action="store_true", help="learning rates fall to zero")
    parser.add_argument("--batch", type=int, default=32, help="number of streams")
    parser.add_argument("--window", type=int, default=32, help="length, in characters")
    parser.add_argument("--hidden", type=int, default=96, help="number of hidden units")
    parser.add_argument("--temperature", type=float, default=0.7, help="lower: likelier text")
    parser.add_argument("--seed", type=int, default=0, help="for the choice; new ones follow")
    parser.add_argument("--seeds", type=int, default=2, help="number of new ones")
    parser.add_argument("--out", type=Path, default=Path("out/char_lstm.png"))
    args = parser.parse_args(argv)

    text = data()
    if args.steps < 1 or args.steps % EVERY:
        parser.error(f"--steps must be a positive multiple of {EVERY}")
    if min(args.batch, args.window, args.hidden, args.seeds) < 1 or args.seed < 0:
        parser.error("--batch, --window, --hidden and --seeds must be at least 1, --seed 0")
    if args.batch * args.window >= len(text.train):
        parser.error(f"--batch times --window must be below {len(text.train)}")
    if not 0 < args.temperature < np.inf:
        parser.error("--temperature must be positive and finite")
    streams = windows(text.train, args.batch, args.window)

    angles = np.linspace(0, np.pi if args.cosine else 0, args.steps, endpoint=False)
    fall = (1 + np.cos(angles)) / 2

    def trained(method: Method, rate: float, seed: int) -> list[tuple[Net, float]]:
        net = Net(len(text.characters), args.hidden, nnx.Rngs(seed))
        bar.update()
        return list(train(net, method, (rate * fall).astype(np.float32), streams))

    runs: dict[str, Run] = {}
    writers: dict[str, Net] = {}
    total = sum(len(method.rates) + args.seeds for method in METHODS.values())
    with tqdm(total=total, unit="run") as bar:
        for name, method in METHODS.items():
            bar.set_description(name)
            choice = []
            for rate in method.rates:
                net, _ = trained(method, rate, args.seed)[-1]
                choice.append(float(perplexity(net, text.validation)))
            rate = method.rates[lowest(choice)]
            curves, lengths, test = [], [], []
            for seed in range(args.seed + 1, args.seed + 1 + args.seeds):
                nets, moved = zip(*trained(method, rate, seed), strict=True)
                curves.append([float(perplexity(net, text.validation)) for net in nets])
                lengths.append(moved)
                test.append(float(perplexity(nets[-1], text.test)))
                writers.setdefault(name, nets[-1])
            runs[name] = Run(choice, rate, np.array(curves), np.array(lengths), test)

    first = text.characters.index("\n")
    codes = write(writers["rmsprop"], first, WRITTEN, args.temperature, jax.random.key(args.seed))
    figures = Figures(runs, "".join(text.characters[code] for code in codes))
    draw(runs, args.out)
    print_tables(runs, args.steps)
    print(f"\nBy rmsprop's first new network, at temperature {args.temperature:g}:\n")
    print(figures.written)
    print(f"\nCurves in {args.out}")
    return figures


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"char_lstm.py: {error}") from None
