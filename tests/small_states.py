"""What the tests of 8- and 16-bit states share: forms, runs, and what the states hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import is_packed, slots_of
from storages import FULL, PARAMS, STACKED

STORAGES = {"q8": low_memory.q8(), "bfloat16": low_memory.bfloat16()}
FORMS = [
    {},
    {"eps_in_sqrt": False, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.9},
    {"bias_correction": True, "momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "cautious": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]


def row(steps, *, low=-3, seed=0):
    """Gradients for parameters of 128 columns, alike in all rows.

    The rows are then so many trials of the rounding.
    """
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(low, 0, 128)
    return np.float32(rng.standard_normal((steps, 1, 128)) * sizes)


def table(rows):
    """Parameters for such gradients."""
    return jnp.ones((rows, 128))


@functools.partial(jax.jit, static_argnums=0)
def after(make, grads, x, *numbers):
    """The updates of every step and the last state of each of make(*numbers), in one program."""
    txs = make(*numbers)

    def step(states, g):
        g = jax.tree.map(lambda g, p: jnp.broadcast_to(g, p.shape), g, x)
        both = [tx.update(g, state, x) for tx, state in zip(txs, states, strict=True)]
        return [state for _, state in both], [updates for updates, _ in both]

    states, updates = jax.lax.scan(step, [tx.init(x) for tx in txs], grads)
    return list(zip(updates, states, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def last(make, grads, x, *numbers):
    """The last states alone."""
    return [state for _, state in after(make, grads, x, *numbers)]


@jax.jit
def decoded(field):
    return jax.tree.map(
        lambda slot: slot.decode() if is_packed(slot) else slot, slots_of(field), is_leaf=is_packed
    )


def values(field):
    """The numbers of a field, in float64."""
    return jax.tree.map(lambda values: np.asarray(values, np.float64), decoded(field))


def fields(state):
    """The fields in use."""
    return [field for field in (state.nu, state.mu, state.trace) if field is not None]


@functools.cache
def trained(storage):
    """A state with every slot after four steps."""
    return last(lambda: [rmsprop(0.1, **FULL, storage=storage)], STACKED, PARAMS)[0]
