"""A tree of parameters and its mapping, and each framework's conversions in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import convert, dialects, rmsprop
from rmsprop_jax._rule import is_ours
from rmsprop_jax.convert import Leaf

# A tree with a leaf of every kind of layout, and the names of the framework in its order.
SHAPES = {
    "fc": {"kernel": (3, 2), "bias": (2,)},
    "cell": {"i": (2, 3), "o": (2, 3)},
    "flat": (12, 5),
}
MAPPING = {
    "fc/kernel": Leaf("fc.weight", (1, 0)),
    "fc/bias": "fc.bias",
    "cell/i": Leaf("cell.weight", (1, 0), part=(0, 2, 0)),
    "cell/o": Leaf("cell.weight", (1, 0), part=(1, 2, 0)),
    "flat": Leaf("flat.weight", (2, 3, 1, 0), (-1, 3, 2, 2)),
}
NAMES = ["cell.weight", "flat.weight", "fc.weight", "fc.bias"]


def tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def begun(tx, params):
    """The parameters, and a state as after seven steps: a random number everywhere."""
    rng = np.random.default_rng(7)

    def slot(likes, part=np.asarray):
        def array(like):
            parts = part(rng.standard_normal((2, *like.shape)))
            is_complex = np.issubdtype(like.dtype, np.complexfloating)
            return jnp.asarray(parts[0] + 1j * parts[1] if is_complex else parts[0], like.dtype)

        return jax.tree.map(array, likes)

    def fill(state):
        if not is_ours(state):
            return state
        slots = {"nu": slot(state.nu, np.abs), "mu": slot(state.mu), "trace": slot(state.trace)}
        return state._replace(count=jnp.asarray(7, jnp.int32), **slots)

    return params, jax.tree.map(fill, jax.eval_shape(tx.init, params), is_leaf=is_ours)


def going_on(txs):
    """A function that takes {name: (params, state)} on by some gradients, all in one program."""

    @jax.jit
    def step(runs, grads):
        after = {}
        for name, (params, state) in runs.items():
            updates, state = txs[name].update(grads, state, params)
            after[name] = (optax.apply_updates(params, updates), state)
        return after

    return lambda runs, grads: functools.reduce(step, grads, runs)


def group(numbers=(0, 1, 2, 3), **options):
    """One of torch.optim.RMSprop's param_groups."""
    defaults = {
        "lr": 0.01,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
        "centered": False,
        "maximize": False,
        "capturable": False,
        "foreach": None,
        "differentiable": False,
    }
    return defaults | options | {"params": list(numbers)}


def timm_group(numbers=(0, 1, 2, 3), **options):
    """One of timm's RMSpropTF's param_groups."""
    defaults = {
        "lr": 0.01,
        "momentum": 0.0,
        "alpha": 0.9,
        "eps": 1e-10,
        "centered": False,
        "weight_decay": 0,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
        "max_lr_snapshot": None,
        "lr_in_momentum": True,
        "caution": False,
        "foreach": None,
    }
    return defaults | options | {"params": list(numbers)}


class Framework:
    """Both directions of one framework, with arguments that fit the tree above."""

    def __init__(self, name, **options):
        self.name = name
        self.options = options
        build = {"tensorflow": "tensorflow_v1"}.get(name, name)
        if name == "optax":
            self.tx = rmsprop(0.01, **options)
            self.theirs = optax.rmsprop(0.01, **options)
        else:
            self.tx = getattr(dialects, build)(
                **{"pytorch": {}, "timm": {}}.get(name, {"learning_rate": 0.01}), **options
            )

    def to(self, state, params):
        if self.name == "keras":
            return convert.to_keras(
                state, params, MAPPING, self.tx, learning_rate=0.01, names=NAMES
            )
        if self.name == "tensorflow":
            return convert.to_tensorflow_v1(state, params, MAPPING, self.tx)
        if self.name == "optax":
            return convert.to_optax(state, params, self.tx, self.theirs.init(params))
        make = {"pytorch": (convert.to_pytorch, group), "timm": (convert.to_timm, timm_group)}
        to, one = make[self.name]
        groups = [one(**self.options)]
        return to(state, params, MAPPING, self.tx, param_groups=groups, names=NAMES)

    def back(self, given, params, tx=None, mapping=MAPPING, **rest):
        tx = tx or self.tx
        if self.name == "tensorflow":
            return convert.from_tensorflow_v1(given, params, mapping, tx, steps=7, **rest)
        if self.name == "optax":
            return convert.from_optax(given, params, tx, steps=7)
        rest = {"names": NAMES} | rest
        return getattr(convert, f"from_{self.name}")(given, params, mapping, tx, **rest)


FORMS = [
    {},
    {"momentum": 0.9},
    {"centered": True},
    {"momentum": 0.9, "centered": True},
]
FRAMEWORKS = [
    pytest.param(Framework(name, **form), id="-".join([name, *form]))
    for name in ("pytorch", "timm", "keras", "tensorflow", "optax")
    for form in FORMS
]


def assert_same(got, want):
    """Bit for bit, of the same dtypes, in the same places."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def assert_one_rounding(got, want, size):
    """To the precision of a number of that size."""
    assert np.all(np.abs(got - want) <= np.spacing(np.abs(size)))
