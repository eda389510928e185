"""Equal arguments make equal transformations, and copies of a transformation equal it."""

import copy
import dataclasses
import functools
import pickle
import types

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import (
    _equations,
    _transformation,
    dialects,
    low_memory,
    recipes,
    rmsprop,
    scale_by_rms,
    sharding,
)

MESH = jax.make_mesh((1,), ("data",))


def is_norm(path):
    return "norm" in path


def cosine(count):
    return 0.1 * jnp.cos(count)


MAKERS = {
    "plain": lambda: rmsprop(0.1),
    "all switches": lambda: rmsprop(
        0.1, 0.8, 1e-3, 0.0, False, True, 0.5, True, True, weight_decay=0.1, cautious=True
    ),
    "scale_by_rms": lambda: scale_by_rms(0.99, centered=True),
    "a schedule": lambda: rmsprop(cosine),
    "q8": lambda: rmsprop(0.1, storage=low_memory.q8(exempt=is_norm)),
    "bfloat16": lambda: rmsprop(0.1, storage=low_memory.bfloat16(seed=3)),
    "keras_legacy": lambda: dialects.keras_legacy(cosine, decay=1e-3),
    "timm": lambda: dialects.timm(
        cosine, weight_decay=0.1, decoupled_decay=True, corrected_weight_decay=True, initial_lr=0.1
    ),
    "zero1_mapped": lambda: sharding.zero1_mapped(rmsprop(0.1), "data"),
    "zero1": lambda: sharding.zero1(rmsprop(0.1), MESH, "data"),
    **{name: getattr(dialects, name) for name in ("pytorch", "keras", "graves", "d2l")},
    "nature_dqn": recipes.nature_dqn,
    "dqn_zoo": recipes.dqn_zoo,
    "impala": lambda: recipes.impala(100, max_norm=1.0),
    "torchbeast": lambda: recipes.torchbeast(100),
    "a2c": lambda: recipes.a2c(100, 10),
    "mobilenet_v2": lambda: recipes.mobilenet_v2(800),
    "mobilenet_v3": lambda: recipes.mobilenet_v3(313),
    "efficientnet": lambda: recipes.efficientnet(313),
    "torchvision_mobilenet_v3": recipes.torchvision_mobilenet_v3,
    "wgan": recipes.wgan,
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tx: pickle.loads(pickle.dumps(tx)),
    "cloudpickle": lambda tx: cloudpickle.loads(cloudpickle.dumps(tx)),
    "replaced": lambda tx: tx._replace(),
}


def test_equal_arguments_make_equal_transformations_and_others_do_not():
    made = {name: make() for name, make in MAKERS.items()}
    for name, tx in made.items():
        again = MAKERS[name]()
        assert again == tx, name
        assert hash(again) == hash(tx), name
        assert [other for other in made if made[other] == tx] == [name]


def test_copies_are_equal(subtests):
    for name, make in MAKERS.items():
        tx = make()
        for way, copied in COPIES.items():
            if way.endswith("pickle") and name == "zero1":
                continue  # a mesh is of this process's devices
            with subtests.test(of=name, by=way):
                assert copied(tx) == tx
                assert hash(copied(tx)) == hash(tx)


def test_copies_of_what_holds_a_transformation_are_equal():
    """As a train state holds it: one that was copied is not traced again."""

    @dataclasses.dataclass
    class Trainer:
        tx: optax.GradientTransformation
        chain: optax.GradientTransformation

    tx = rmsprop(jnp.float32(0.1), decay=lambda count: 0.9)
    trainer = Trainer(tx, optax.chain(optax.clip(1.0), tx))
    assert copy.deepcopy(trainer) == trainer


def test_a_copy_compiles_nothing():
    """An eager step has one program a shape, whoever made the transformation, and how."""
    traced = []

    def schedule(count):
        traced.append(count)
        return 0.1

    storages = (None, low_memory.bfloat16(), low_memory.q8())
    params = jnp.ones((8, 512))
    step = jax.jit(lambda tx, g, state: tx.update(g, state), static_argnums=0)
    for storage in storages:
        tx = rmsprop(schedule, momentum=0.9, storage=storage)
        state = tx.init(params)
        step(tx, params, state)
        tx.update(params, state)
        programs = _equations.step._cache_size()
        unpickled = pickle.loads(pickle.dumps(rmsprop(0.2, momentum=0.9, storage=storage)))
        for copied in (copy.deepcopy(tx), rmsprop(schedule, momentum=0.9, storage=storage)):
            traced.clear()
            step(copied, params, state)
            assert not traced
            copied.update(params, state)
        unpickled.update(params, state)
        chain = cloudpickle.loads(cloudpickle.dumps(optax.chain(tx)))  # equal to none, as in Optax
        chain.update(params, (state,))
        assert _equations.step._cache_size() == programs


def test_storages_made_by_equal_arguments_are_equal():
    makers = [
        lambda: rmsprop(0.1).part.variant.storage,
        low_memory.q8,
        low_memory.bfloat16,
        lambda: low_memory.q8(min_size=64),
        lambda: low_memory.q8(exempt=is_norm),
        lambda: low_memory.bfloat16(seed=1),
    ]
    for make in makers:
        for again in (make(), copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
            assert again == make()
            assert hash(again) == hash(make())
    assert len({make() for make in makers}) == len(makers)


def test_arrays_and_closures_are_equal_if_they_are_the_same():
    """What they hold may not be known, as inside jit, and is not looked at."""
    array = rate = jnp.float32(0.1)
    assert rmsprop(array) == rmsprop(array)
    assert rmsprop(array) != rmsprop(jnp.float32(0.1))
    assert rmsprop(lambda count: 0.1) != rmsprop(lambda count: 0.1)

    @jax.jit
    def traced(rate, other):
        assert rmsprop(rate) == rmsprop(rate)
        assert rmsprop(rate) != rmsprop(other)
        return rate

    traced(rate, rate)

    for array in (jnp.int32(1), jnp.complex64(1)):
        assert rmsprop(array, momentum=array) == rmsprop(array, momentum=array)
    assert rmsprop(0.0) != rmsprop(-0.0)


class Odd:
    """A schedule that nobody can compare or hash, and may change."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, count):
        return jnp.float32(self.rate)

    def at(self, count):
        return self(count)


class Unhashable(Odd):
    __hash__ = None


class Raises(Odd):
    def __hash__(self):
        raise ValueError("no hash")


class Elementwise(Odd):
    def __eq__(self, other):
        return np.array([True, False])

    def __hash__(self):
        return 1


@jax.tree_util.register_pytree_node_class
class Table(Odd):
    """With a NumPy array as static data."""

    def tree_flatten(self):
        return (self.rate,), np.array([1.0, 2.0])

    @classmethod
    def tree_unflatten(cls, data, leaves):
        return cls(*leaves)


def test_schedules_of_others_are_not_looked_into():
    g = jnp.ones(2)
    for kind in (
        Odd,
        Unhashable,
        Raises,
        Elementwise,
        Table,
        functools.partial(jax.tree_util.Partial, Odd(0.1)),
    ):
        one = kind(0.1)
        for make in (rmsprop, dialects.pytorch, dialects.keras_legacy):
            first = make(one)
            assert make(one) == first
            assert make(kind(0.1)) != first
    changed = Table(0.1)
    first, changed.rate = rmsprop(changed), 0.2
    updates, _ = rmsprop(Table(0.1)).update(g, first.init(g))
    np.testing.assert_allclose(updates, -0.1 / np.sqrt(0.1), rtol=1e-6)
    assert rmsprop(changed.at) == rmsprop(changed.at)
    for path in (Elementwise(0.1), Raises(0.1)):
        rmsprop(0.1, storage=low_memory.q8(exempt=path))
        rmsprop(0.1, storage=low_memory.q8(exempt=path))


def test_nothing_keeps_a_transformation_alive():
    """Or else every learning rate that was tried would stay, and tracers with it."""
    with jax.checking_leaks():

        @jax.jit
        def final(rate):
            tx, x = rmsprop(rate), jnp.ones(3)
            return tx.update(x, tx.init(x))[0]

        final(jnp.float32(0.1))
    before = len(_transformation._UPDATES)
    for rate in np.linspace(0.2, 0.3, 50):
        rmsprop(rate)
    assert len(_transformation._UPDATES) == before


def test_init_and_update_are_functions_that_close_over_the_hyperparameters():
    """As everywhere in Optax: programs that open closures find the arrays to trace."""

    def arrays(value):
        if isinstance(value, types.FunctionType):
            return [
                array for cell in value.__closure__ or () for array in arrays(cell.cell_contents)
            ]
        leaves = jax.tree.leaves(value)
        if leaves == [value]:
            return [value] if isinstance(value, jax.Array) else []
        return [array for leaf in leaves for array in arrays(leaf)]

    rate, decay = jnp.float32(0.1), jnp.float32(0.9)
    for tx in (
        rmsprop(rate, decay),
        dialects.keras_legacy(rate, decay, decay=0.1),
        optax.chain(optax.clip(1.0), rmsprop(rate, decay)),
        sharding.zero1(rmsprop(rate, decay), MESH, "data"),
    ):
        for function in (tx.init, tx.update):
            assert isinstance(function, types.FunctionType)
            assert {id(array) for array in arrays(function)} >= {id(rate), id(decay)}
