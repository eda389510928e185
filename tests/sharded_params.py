"""Parameters that eight devices can shard, and transformations to test on them."""

import functools

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from rmsprop_jax import low_memory, rmsprop, scale_by_rms

SHAPES = {"a": {"kernel": (16, 8), "bias": (8,)}, "kernel": (8,), "scale": (), "odd": (5, 8)}
SPECS = {
    "a": {"kernel": P("x"), "bias": P("x")},
    "kernel": P("x"),
    "scale": P(),
    "odd": P(None, "x"),
}


def is_shape(node):
    return isinstance(node, tuple) and not isinstance(node, P)


RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda shape: np.asarray(RNG.uniform(0.5, 1.5, shape), np.float32), SHAPES, is_leaf=is_shape
)


def where(mesh):
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda node: isinstance(node, P)
    )


def labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "rest", params)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


RMS = functools.partial(rmsprop, 0.1, centered=True, momentum=0.9)
WRAPPED = {
    "alone": RMS,
    "corrected": lambda: rmsprop(0.1, bias_correction=True),
    "scaled": scale_by_rms,
    "bfloat16": lambda: RMS(storage=low_memory.bfloat16()),
    "q8": lambda: RMS(storage=low_memory.q8(min_size=0)),
    "master weights": lambda: low_memory.master_weights(RMS(storage=low_memory.q8(min_size=0))),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), RMS(), optax.trace(0.9)),
    "named chain": lambda: optax.named_chain(("rms", RMS()), ("ema", optax.ema(0.9))),
    "masked": lambda: optax.masked(RMS(), matrices),
    "partition": lambda: optax.partition({"matrix": RMS(), "rest": optax.sgd(0.1)}, labels),
    "multi steps": lambda: optax.MultiSteps(RMS(), 2),
    "if finite": lambda: optax.apply_if_finite(RMS(), 3),
    "injected": lambda: optax.inject_hyperparams(rmsprop)(0.1, momentum=0.9),
    "of optax": lambda: optax.adam(0.1),
    "noise": lambda: optax.chain(RMS(), optax.add_noise(0.1, 0.5, 0)),
}
