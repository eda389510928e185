"""What the quality benchmarks train: five small networks on real and synthetic data.

A task is made for a dtype, in which its network computes; initial parameters are float32.
"""

import collections
from collections.abc import Callable
import functools
from pathlib import Path
import re
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import real_data

Params = Any
Rows = tuple[NDArray[Any], NDArray[Any]]  # inputs and targets, of equal length
Dtype = Any
Make = Callable[[Dtype, nnx.Rngs], nnx.Module]


class Task(NamedTuple):
    """What is trained, on what, and how."""

    name: str
    init: Callable[[int], Params]  # from a seed
    loss: Callable[..., jax.Array]  # of parameters, inputs and targets
    train: Rows
    test: Rows
    steps: int
    batch: int
    learning_rate: float
    decay: float = 0.99
    momentum: float | None = None


class Convolutions(nnx.Module):
    """Two convolutions of stride 2 and two dense layers: ten logits from images of 28 x 28."""

    def __init__(self, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(7 * 7 * 32, 64, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(64, 10, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From (n, 28, 28), 0 to 255, to (n, 10)."""
        x = nnx.relu(self.conv1(images[..., None] / 255.0))
        x = nnx.relu(self.conv2(x))
        return self.fc2(nnx.relu(self.fc1(x.reshape(len(x), -1))))


class Recurrent(nnx.Module):
    """An LSTM that predicts the next character at each place."""

    width = 96

    def __init__(self, characters: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        cell = nnx.OptimizedLSTMCell(64, self.width, dtype=dtype, rngs=rngs)
        self.embed = nnx.Embed(characters, 64, dtype=dtype, rngs=rngs)
        self.lstm = nnx.RNN(cell, rngs=rngs)
        self.out = nnx.Linear(self.width, characters, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (n, length) to (n, length, characters)."""
        zeros = jnp.zeros((len(x), self.width), self.dtype)
        return self.out(self.lstm(self.embed(x), initial_carry=(zeros, zeros)))


class Block(nnx.Module):
    """A transformer block: causal attention and an MLP, both residual."""

    def __init__(self, width: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """From (n, length, width) to an array of that shape."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Two blocks that predict the next character at each place."""

    width = 64

    def __init__(self, characters: int, length: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(characters, self.width, dtype=dtype, rngs=rngs)
        self.places = nnx.Embed(length, self.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(self.width, dtype, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(self.width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(self.width, characters, dtype=dtype, rngs=rngs)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """From (n, length) to (n, length, characters)."""
        x = self.embed(codes) + self.places(jnp.arange(codes.shape[1]))
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(codes))
        return self.out(self.norm(x))


class Words(nnx.Module):
    """Concatenated embeddings of a few words, a hidden layer, and logits of the next word."""

    def __init__(self, words: int, before: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(words, 64, dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear(64 * before, 64, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(64, words, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (n, before) to (n, words)."""
        return self.out(nnx.tanh(self.hidden(self.embed(x).reshape(len(x), -1))))


def classifier(make: Make, dtype: Dtype) -> tuple[Any, Any]:
    """Init and loss of a model that returns logits; the loss is a mean cross-entropy in nats."""
    graph, _, rest = nnx.split(make(dtype, nnx.Rngs(0)), nnx.Param, ...)  # type: ignore[misc]

    def init(seed: int) -> Params:
        return nnx.state(make(dtype, nnx.Rngs(seed)), nnx.Param)

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(x).astype(jnp.float32)
        labels = y.astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return init, loss


def clothes(data: real_data.FashionMNIST, dtype: Dtype = jnp.float32) -> Task:
    """Images in ten classes; the only task with momentum."""
    train, test = (data.images, data.labels), (data.test_images, data.test_labels)
    init, loss = classifier(Convolutions, dtype)
    return Task("CNN, Fashion-MNIST", init, loss, train, test, 500, 64, 5e-4, momentum=0.9)


def characters(text: str, length: int) -> tuple[int, Rows, Rows]:
    """How many characters are known; pairs of runs of this length, the second one place later."""
    known, codes = np.unique(np.frombuffer(text.encode(), np.uint8), return_inverse=True)
    train, test = windows(codes.astype(np.uint8), length + 1)
    return len(known), (train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:])


def lstm(text: str, dtype: Dtype = jnp.float32) -> Task:
    """The next character, 32 times in a row."""
    known, train, test = characters(text, 32)
    return Task(
        "LSTM, characters of tiny Shakespeare",
        *classifier(functools.partial(Recurrent, known), dtype),
        train,
        test,
        steps=400,
        batch=16,
        learning_rate=1e-2,
    )


def transformer(text: str, dtype: Dtype = jnp.float32) -> Task:
    """The next character, 64 times in a row."""
    known, train, test = characters(text, 64)
    return Task(
        "transformer, characters of tiny Shakespeare",
        *classifier(functools.partial(Transformer, known, 64), dtype),
        train,
        test,
        steps=600,
        batch=16,
        learning_rate=4e-3,
    )


def words(text: str, dtype: Dtype = jnp.float32, size: int = 3000) -> Task:
    """The word after three others, among the most frequent; most rows get no gradient."""
    found = re.findall(r"[a-z']+|[^\sa-z']", text.lower())
    frequent = [word for word, _ in collections.Counter(found).most_common(size - 1)]
    number = {word: i for i, word in enumerate(frequent, start=1)}  # 0 is for all others
    train, test = windows(np.array([number.get(word, 0) for word in found]), 4)
    return Task(
        "embeddings, words of tiny Shakespeare",
        *classifier(functools.partial(Words, size, 3), dtype),
        (train[:, :-1], train[:, -1]),
        (test[:, :-1], test[:, -1]),
        steps=600,
        batch=64,
        learning_rate=1e-2,
    )


def windows(codes: NDArray[Any], length: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Overlapping runs from the first nine tenths of a text, and disjoint ones from the last."""
    split = len(codes) * 9 // 10
    train = np.lib.stride_tricks.sliding_window_view(codes[:split], length)
    test = np.lib.stride_tricks.sliding_window_view(codes[split:], length)[::length]
    return train, test


def regression(dtype: Dtype = jnp.float32) -> Task:
    """A linear map without noise: its gradients and second moments shrink with the error.

    64 inputs, mixed from sources whose sizes are 1, 1/2, 1/3, ..., give 128 outputs. The decay is
    0.999, so a step lowers a second moment by a thousandth at most, less than bfloat16 resolves.
    """
    rng = np.random.default_rng(0)
    inputs, outputs = 64, 128
    rotation, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
    sources = rng.standard_normal((4096, inputs)) / np.arange(1, inputs + 1)
    # The inputs are rounded to the dtype, and the outputs computed from the rounded inputs.
    x = (sources @ rotation).astype(dtype).astype(np.float64)
    y = x @ rng.standard_normal((inputs, outputs))
    x, y = x.astype(np.float32), y.astype(np.float32)

    def init(seed: int) -> jax.Array:
        rng = np.random.default_rng(seed)
        return jnp.asarray(rng.standard_normal((inputs, outputs), dtype=np.float32))

    def loss(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs = jnp.matmul(x.astype(dtype), params, preferred_element_type=jnp.float32)
        return jnp.mean(jnp.square(outputs - y))

    train, test = (x[:3072], y[:3072]), (x[3072:], y[3072:])
    return Task(
        "regression, shrinking gradients", init, loss, train, test, 4000, 64, 3e-2, decay=0.999
    )
