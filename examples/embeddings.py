"""Word vectors from Shakespeare, by steps on only the rows of a table that a batch touches.

    python examples/embeddings.py                # about a minute and a half on two cores
    python examples/embeddings.py --rows 20000   # tables of a single, small size

Skip-gram with negative sampling: from the vector of a word, the network tells the word's neighbours
in the text from words drawn at random. There are two tables, one of words and one of neighbours. A
batch touches few of their rows, but a gradient with respect to the tables is as large as the
tables, and the usual step goes through all of it. `rows.update` takes the gradient with respect to
the rows that were looked up, and its cost depends on these rows alone.

A hash assigns words to rows, as for a vocabulary that is not known beforehand; two words may share
a row. The tables have up to 2^18 rows to show what that costs; 12,631 words do not need so many.

Three ways start from the same tables and see the same batches: dense steps; `rows`, which makes the
same steps within rounding; and `rows` with lazy=True, which does what TensorFlow does: the second
moment of a row decays only in steps that touch it. The learning rate falls linearly to zero. This
is RMSProp without momentum. With momentum, rows also move while no batch touches them:
`rows.advance` brings rows up to date before they are looked up, and `rows.settle` brings all rows
up to date before the whole table is used.

Prints and draws the time per step by the size of the tables. Prints the losses of the three ways,
and how far apart the tables of the first two are. After longer runs, prints the losses of rows and
lazy rows, and the nearest neighbours of some words, by the cosine of their vectors.

Sources: Mikolov et al., "Distributed representations of words and phrases and their
compositionality", arXiv:1310.4546, 2013 (the method, and frequent words left out at random);
Weinberger et al., "Feature hashing for large scale multitask learning", arXiv:0902.2206, 2009. The
data: Karpathy, https://github.com/karpathy/char-rnn.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from pathlib import Path
import re
import time
from typing import Any, NamedTuple, TypeAlias
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from drawing import label_ends, picture
import real_data
from rmsprop_jax import rmsprop, rows

METHODS = DENSE, ROWS, LAZY = "dense", "rows", "rows, lazy"

Codes = NDArray[np.int32]
Tx: TypeAlias = optax.GradientTransformation
Step = tuple["Tables", Any, jax.Array]  # new tables and state, and the loss per pair

SIZES = tuple(2**k for k in (12, 14, 16, 18))
WIDTH = 64  # elements in a row
WINDOW = 4  # words on each side that count as neighbours
NEGATIVES = 5  # words drawn at random for each neighbour
FREQUENT = 1e-3  # words with a larger share of the text are left out at random
LAST = 250  # steps whose mean loss is reported for a longer run
WORDS = ("king", "queen", "father", "thou", "love", "night", "death", "three")
SEEN = 30  # times a word must occur to be listed as a nearest one


class Text(NamedTuple):
    """The sorted words, how often each occurs, and pairs (n, 2) of neighbours, as codes."""

    words: list[str]
    counts: NDArray[np.int64]
    pairs: Codes


def data() -> Text:
    found = re.findall(r"[a-z']+", real_data.tiny_shakespeare().lower())
    words, codes, counts = np.unique(found, return_inverse=True, return_counts=True)
    kept = np.sqrt(FREQUENT * len(codes) / counts)[codes]  # probabilities, or above 1
    codes = codes[np.random.default_rng(0).random(len(codes)) < kept].astype(np.int32)
    apart = range(1, WINDOW + 1)
    pairs = np.concatenate([np.column_stack([codes[:-d], codes[d:]]) for d in apart])
    return Text(words.tolist(), counts, np.concatenate([pairs, pairs[:, ::-1]]))


def places(words: Sequence[str], n: int) -> Codes:
    """The row of each word in a table of n rows."""
    return np.array([zlib.crc32(word.encode()) % n for word in words], np.int32)


def batches(text: Text, n: int, size: int, steps: int, seed: int) -> Iterator[tuple[Codes, Codes]]:
    """Batches of table rows: of words (size,), and of others (size, NEGATIVES + 1).

    The others of a word are one of its neighbours, then NEGATIVES words drawn at random. The pairs
    are shuffled for each epoch; an incomplete last batch is dropped.
    """
    at, drawn = places(text.words, n), np.cumsum(text.counts**0.75)
    rng, each = np.random.default_rng(seed), len(text.pairs) // size
    for step in range(steps):
        if step % each == 0:
            order = rng.permutation(len(text.pairs))[: each * size].reshape(each, size)
        words, neighbours = text.pairs[order[step % each]].T
        others = np.searchsorted(drawn, drawn[-1] * rng.random((size, NEGATIVES)), side="right")
        yield at[words], at[np.column_stack([neighbours, others])]


class Tables(NamedTuple):
    """The two tables, or their states or gradients."""

    words: Any
    neighbours: Any


def start(n: int, seed: int) -> Tables:
    """Small random vectors for words, and zeros for neighbours."""
    words = np.random.default_rng(seed).random((n, WIDTH), np.float32)
    return Tables(jnp.asarray((words - 0.5) / WIDTH), jnp.zeros((n, WIDTH)))


def negative_sampling(words: jax.Array, others: jax.Array) -> jax.Array:
    """The loss of words (n, WIDTH) and, for each, a neighbour and NEGATIVES other words.

    Summed over the batch, so that the gradient of a row does not depend on the batch size.
    """
    logits = jnp.einsum("nd,nkd->nk", words, others)
    return -jnp.sum(jax.nn.log_sigmoid(logits.at[:, 1:].multiply(-1)))


def dense_step(tx: Tx, tables: Tables, state: Any, i: Any, j: Any) -> Step:
    """The usual step: the gradient is with respect to the tables."""

    def loss(tables: Tables) -> jax.Array:
        return negative_sampling(tables.words[i], tables.neighbours[j])

    value, grads = jax.value_and_grad(loss)(tables)
    updates, state = tx.update(grads, state, tables)
    return optax.apply_updates(tables, updates), state, value / len(i)


def rows_step(tx: Tx, tables: Tables, states: Any, i: Any, j: Any) -> Step:
    """The gradient is with respect to the rows that are looked up, and only they make a step."""
    loss = jax.value_and_grad(negative_sampling, argnums=(0, 1))
    value, grads = loss(tables.words[i], tables.neighbours[j])
    words, of_words = rows.update(tx, i, grads[0], tables.words, states.words)
    neighbours, of_neighbours = rows.update(tx, j, grads[1], tables.neighbours, states.neighbours)
    return Tables(words, neighbours), Tables(of_words, of_neighbours), value / len(i)


def embed_step(tx: Tx, embed: nnx.Embed, state: Any, i: Any, loss: Callable) -> Any:
    """The same for a module: updates its table in place and returns the state.

    The loss takes the rows instead of embed(i). In linen the table is params["embedding"].
    """
    table = embed.embedding[...]
    grads = jax.grad(loss)(table[i])
    embed.embedding[...], state = rows.update(tx, i, grads, table, state)
    return state


class Run(NamedTuple):
    """The final tables, the loss at each step, and the median milliseconds per step."""

    tables: Tables
    losses: list[float]
    ms: float


def train(method: str, tx: Tx, tables: Tables, feed: Iterable[Any], bar: Any) -> Run:
    state: Any
    if method == DENSE:
        state = tx.init(tables)
    else:
        state = Tables(*(rows.init(tx, table, lazy=method == LAZY) for table in tables))
    of_method = functools.partial(dense_step if method == DENSE else rows_step, tx)
    # Donated: otherwise a step would copy both tables, however few of their rows it touches.
    step = jax.jit(of_method, donate_argnums=(0, 1))
    losses, seconds = [], []
    for i, j in feed:
        begun = time.perf_counter()
        tables, state, loss = jax.block_until_ready(step(tables, state, i, j))
        seconds.append(time.perf_counter() - begun)
        losses.append(float(loss))
        bar.update()
    return Run(tables, losses, 1e3 * float(np.median(seconds[1:])))  # the first step compiles


def nearest(text: Text, vectors: NDArray[np.float32], word: str, count: int = 6) -> list[str]:
    """The words with the largest cosines, among those that occur at least SEEN times."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[text.words.index(word)]))
    near = [text.words[code] for code in order if text.counts[code] >= SEEN]
    return [other for other in near if other != word][:count]


class Result(NamedTuple):
    """The results: `ms` for each number of rows, everything else for the largest.

    Milliseconds per step and losses of the compared steps, both by method; the largest difference
    between the tables of dense and rows after them, and the tables' largest element; the final
    losses of the longer runs; and words with their nearest ones.
    """

    sizes: list[int]
    ms: dict[str, list[float]]
    losses: dict[str, list[float]]
    apart: float
    largest: float
    last: dict[str, float]
    nearest: dict[str, list[str]]


def print_tables(result: Result) -> None:
    print("Milliseconds per step, by rows of a table")
    print(f"{'':10}" + "".join(f"{n:10,}" for n in result.sizes))
    for name, ms in result.ms.items():
        print(f"{name:10}" + "".join(f"{value:10.2f}" for value in ms))
    n = len(result.losses[DENSE])
    at = sorted(set(np.linspace(1, n, 5).astype(int)))
    print(f"\nLoss per pair at {result.sizes[-1]:,} rows, by step; last {LAST} of a longer run")
    print(f"{'':10}" + "".join(f"{step:10}" for step in at) + f"{'last':>10}")
    for name, losses in result.losses.items():
        last = f"{result.last[name]:10.4f}" if name in result.last else ""
        print(f"{name:10}" + "".join(f"{losses[step - 1]:10.6f}" for step in at) + last)
    print(f"\nAfter {n} steps the tables of dense and rows differ by at most {result.apart:.1e};")
    print(f"their largest element is {result.largest:.2f}.")
    print(f"\nNearest words after a longer run with rows, of those that occur {SEEN} times or more")
    for word, others in result.nearest.items():
        print(f"{word:10}{' '.join(others)}")


def draw(result: Result, out: Path) -> None:
    with picture(out, height=4) as figure:
        axes = figure.subplots()
        for (name, ms), marker in zip(result.ms.items(), "os^", strict=True):
            axes.loglog(result.sizes, ms, marker=marker, label=name)
        axes.set_xticks(result.sizes, [f"{n:,}" for n in result.sizes])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="rows of a table", ylabel="milliseconds of a step")
        label_ends(axes)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000, help="steps of the longer runs")
    parser.add_argument("--compared", type=int, default=40, help="steps that all three make")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="rows of a table")
    parser.add_argument("--batch", type=int, default=256, help="pairs of neighbours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/embeddings.png"))
    args = parser.parse_args(argv)

    text, sizes = data(), sorted(set(args.rows))
    if min(args.steps, args.compared) < 2:  # the first step compiles
        parser.error("--steps and --compared must be at least 2")
    if not 1 <= sizes[0] <= sizes[-1] <= 2**24:
        parser.error(f"--rows must be from 1 to {2**24}")
    if not 1 <= args.batch <= len(text.pairs) or args.seed < 0:
        parser.error(f"--batch must be from 1 to {len(text.pairs)}, --seed at least 0")

    tx = rmsprop(optax.linear_schedule(0.01, 0.0, args.steps), decay=0.99, eps=1e-6)
    total = len(METHODS) * len(sizes) * args.compared + 2 * args.steps
    with tqdm(total=total, unit="step") as bar:

        def trained(name: str, n: int, steps: int) -> Run:
            bar.set_description(f"{name}, {n:,} rows")
            feed = batches(text, n, args.batch, steps, args.seed)
            return train(name, tx, start(n, args.seed), feed, bar)

        ms: dict[str, list[float]] = {name: [] for name in METHODS}
        for n in sizes:
            short = {name: trained(name, n, args.compared) for name in METHODS}
            for name, run in short.items():
                ms[name].append(run.ms)
        losses = {name: run.losses for name, run in short.items()}
        ours, usual = (np.stack(short.pop(name).tables) for name in (ROWS, DENSE))
        apart, largest = float(np.abs(ours - usual).max()), float(np.abs(usual).max())
        long = {name: trained(name, n, args.steps) for name in (ROWS, LAZY)}
    last = {name: float(np.mean(run.losses[-LAST:])) for name, run in long.items()}
    vectors = np.asarray(long[ROWS].tables.words)[places(text.words, n)]
    near = {word: nearest(text, vectors, word) for word in WORDS if word in text.words}
    result = Result(sizes, ms, losses, apart, largest, last, near)

    draw(result, args.out)
    print_tables(result)
    print(f"\nTimes in {args.out}")
    return result


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"embeddings.py: {error}") from None
