"""The models of tests/compare/models.py, in linen and NNX."""

from flax import linen, nnx
import jax.numpy as jnp
import numpy as np

import models

CHANNELS, FEATURES = models.IMAGE[-1], models.FLAT[-1]
EPSILON = {"pytorch": 1e-5, "keras": 1e-3}  # of norms


class GRUCellWithBias(nnx.GRUCell):
    """With the bias that PyTorch's has."""

    def __init__(self, inputs, features, *, rngs, **rest):
        super().__init__(inputs, features, rngs=rngs, **rest)
        self.dense_h = nnx.Linear(features, 3 * features, rngs=rngs, **rest)


class LinenCnn(linen.Module):
    epsilon: float

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(FEATURES, models.KERNEL, padding="VALID", use_bias=False, name="conv")(x)
        x = linen.BatchNorm(not train, epsilon=self.epsilon, name="norm")(x)
        return linen.Dense(3, name="fc")(linen.relu(x).reshape(len(x), -1))


class LinenSequence(linen.Module):
    epsilon: float
    cell: type

    @linen.compact
    def __call__(self, x, train):
        x = linen.Embed(7, 3, name="embed")(x)
        x = linen.LayerNorm(epsilon=self.epsilon, name="norm")(x)
        for i in range(2):
            # The cells begin with zeros of the dtype that they are told.
            x = linen.RNN(self.cell(4, param_dtype=jnp.float64, name=f"cell{i}"))(x)
        return linen.Dense(2, name="fc")(x[:, -1])


class LinenAttention(linen.Module):
    epsilon: float

    @linen.compact
    def __call__(self, x, train):
        x = linen.Embed(7, models.HEADS * models.SIZE, name="embed")(x)
        x = linen.MultiHeadDotProductAttention(models.HEADS, name="first")(x)
        x = linen.MultiHeadDotProductAttention(models.HEADS, use_bias=False, name="second")(x)
        return linen.Dense(2, name="fc")(x.mean(1))


class LinenVolume(linen.Module):
    epsilon: float

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (1, 2, 3), padding="VALID", name="conv")(x)
        x = linen.GroupNorm(2, epsilon=self.epsilon, name="norm")(x)
        x = linen.relu(x).mean((1, 2))
        return linen.Conv(3, (2,), padding="VALID", use_bias=False, name="line")(x).mean(1)


class NnxCnn(nnx.Module):
    def __init__(self, epsilon, rngs):
        self.conv = nnx.Conv(
            CHANNELS, FEATURES, models.KERNEL, padding="VALID", use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(FEATURES, epsilon=epsilon, rngs=rngs)
        self.fc = nnx.Linear(int(np.prod(models.FLAT)), 3, rngs=rngs)

    def __call__(self, x, train):
        x = self.norm(self.conv(x), use_running_average=not train)
        return self.fc(nnx.relu(x).reshape(len(x), -1))


class NnxSequence(nnx.Module):
    def __init__(self, epsilon, rngs, cell):
        self.embed = nnx.Embed(7, 3, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.LayerNorm(3, epsilon=epsilon, rngs=rngs)
        self.cells = nnx.List(
            [cell(n, 4, param_dtype=jnp.float64, dtype=jnp.float64, rngs=rngs) for n in (3, 4)]
        )
        self.fc = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, train):
        x = self.norm(self.embed(x))
        for cell in self.cells:
            x = nnx.RNN(cell)(x)
        return self.fc(x[:, -1])


def _attention(query, key, value, **_):
    """That of linen: NNX's own computes the softmax in float32."""
    return linen.dot_product_attention(query, key, value)


class NnxAttention(nnx.Module):
    def __init__(self, epsilon, rngs):
        heads, features = models.HEADS, models.HEADS * models.SIZE
        rest = {"decode": False, "param_dtype": jnp.float64, "rngs": rngs}
        rest["attention_fn"] = _attention
        self.embed = nnx.Embed(7, features, param_dtype=jnp.float64, rngs=rngs)
        self.first = nnx.MultiHeadAttention(heads, features, **rest)
        self.second = nnx.MultiHeadAttention(heads, features, use_bias=False, **rest)
        self.fc = nnx.Linear(features, 2, rngs=rngs)

    def __call__(self, x, train):
        return self.fc(self.second(self.first(self.embed(x))).mean(1))


class NnxVolume(nnx.Module):
    def __init__(self, epsilon, rngs):
        self.conv = nnx.Conv(2, 4, (1, 2, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.GroupNorm(4, 2, epsilon=epsilon, rngs=rngs)
        self.line = nnx.Conv(4, 3, (2,), padding="VALID", use_bias=False, rngs=rngs)

    def __call__(self, x, train):
        return self.line(nnx.relu(self.norm(self.conv(x))).mean((1, 2))).mean(1)
