"""Training Flax models, NNX and linen, in each storage."""

import functools

from flax import linen, nnx, serialization
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_moved, assert_same, mesh_of, wait
from rmsprop_jax import rmsprop
from storages import FULL, STORAGES, assert_near, each_storage, types

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Flax

HELD = {"float32": {"float32"}, "q8": {"uint8", "int8"}, "bfloat16": {"bfloat16"}}
X = jnp.linspace(-1, 1, 64).reshape(4, 16)


def loss_of(y):
    return jnp.mean((y - jnp.sin(X)) ** 2)


class Model(nnx.Module):
    """With parameters of every rank, of which only the gain is never in 8 bits."""

    def __init__(self, *axes):
        init, rngs = nnx.initializers.lecun_normal(), nnx.Rngs(0)
        if axes:
            init = nnx.with_partitioning(init, axes)
        self.gain = nnx.Param(jnp.float32(2))
        self.hidden = nnx.Linear(16, 64, kernel_init=init, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(64, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.gain[...] * self.out(jnp.tanh(self.hidden(x)))


def nnx_optimizer(storage, *axes):
    model = Model(*axes)
    return model, nnx.Optimizer(model, rmsprop(0.1, **FULL, storage=storage), wrt=nnx.Param)


def train(tx, params, loss, jit=True):
    """Parameters and state after three steps on the bare tree."""

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert_moved(state)
    return params, state


@each_storage
@pytest.mark.parametrize("jit", [False, True])
def test_nnx_optimizer(jit, storage):
    """As a plain loop on the bare tree, in whatever nodes NNX holds the arrays."""
    model, optimizer = nnx_optimizer(storage)
    graph, variables = nnx.split(model)
    leaves, structure = jax.tree.flatten(variables)
    params = {"gain": leaves[0], "hidden": {"kernel": leaves[1]}}
    params["out"] = dict(zip(("bias", "kernel"), leaves[2:], strict=True))

    def loss(params):
        model = nnx.merge(graph, structure.unflatten(jax.tree.leaves(params)))
        return loss_of(model(X))

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(X)))(model))

    step = nnx.jit(step) if jit else step
    for _ in range(3):
        step(model, optimizer)
    got = map(jax.tree.leaves, (nnx.state(model), optimizer.opt_state))
    want = map(jax.tree.leaves, train(optimizer.tx, params, loss, jit))
    assert_near(list(got), list(want), 0 if storage else 1e-5)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(optimizer.opt_state)}
    assert dtypes >= HELD[next(name for name in STORAGES if STORAGES[name] is storage)]


@each_storage
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda a: a.name)
def test_nnx_shards_the_state_by_the_names_of_axes_of_the_parameters(axis_type, storage):
    """With the bits of one device: the gradients are the parameters, which are no sums."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    want = nnx_optimizer(storage)
    fresh = jax.tree.leaves(nnx.state(want[1].opt_state))
    step(*want)
    moved = zip(fresh, jax.tree.leaves(nnx.state(want[1].opt_state)), strict=True)
    assert (
        sum(np.any(a != b) for a, b in moved) >= 8
    )  # means and buffers of three leaves, and two numbers
    with jax.set_mesh(mesh):
        build = functools.partial(nnx_optimizer, storage, "x", "y")
        graph, shapes = nnx.split(nnx.eval_shape(build))
        places = nnx.get_named_sharding(shapes, mesh)
        init = jax.jit(lambda: nnx.state(build()), out_shardings=places)
        model, optimizer = nnx.merge(graph, jax.block_until_ready(init()))
        step(model, optimizer)
        state = jax.block_until_ready(nnx.state(optimizer.opt_state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = P("x", "y") if "kernel" in name else P()
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), name
    got, want = jax.device_get([jax.tree.leaves(s) for s in (state, nnx.state(want[1].opt_state))])
    assert_near(got, want, 0 if storage else 1e-6)


def test_nnx_names_the_leaf_that_does_not_fit():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = rmsprop(0.1)
    state = tx.init(params)
    wrong = jax.tree.map(lambda leaf: leaf[None], params)
    with pytest.raises(AssertionError, match=r"bias.*\[1, 2\].*\[2\]"):
        tx.update(wrong, state)


@each_storage
def test_linen_train_state_and_its_bytes(storage):
    model = linen.Dense(16)
    params = model.init(jax.random.key(0), X)
    tx = rmsprop(0.1, **FULL, storage=storage)
    fresh = state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params):
        return loss_of(model.apply(params, X))

    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    for _ in range(3):
        before = types(state.opt_state)
        state = step(state)
        assert types(state.opt_state) == before
    assert_near((state.params, state.opt_state), train(tx, params, loss), 0 if storage else 1e-5)
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert_same(restored.opt_state, state.opt_state)
    assert_same(step(restored).opt_state, step(state).opt_state)


def test_a_kernel_that_is_partitioned_on_its_last_axis():
    """By Linen's annotations, under jit with shardings of the outputs: codes have its shape."""
    mesh = mesh_of(4)
    split = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "x"))
    model, x = linen.Dense(128, kernel_init=split), jnp.ones((2, 48))

    def init(key):
        params = model.init(key, x)
        return params, [tx.init(params) for tx in txs]

    txs = [rmsprop(0.1, momentum=0.9, storage=storage) for storage in STORAGES.values()]
    key = jax.random.key(0)
    shapes = jax.eval_shape(init, key)
    places = linen.get_sharding(shapes, mesh)
    params, states = wait(jax.jit(init, out_shardings=places))(key)
    kernel = params["params"]["kernel"].value
    assert kernel.sharding.spec == P(None, "x")
    for state, tx in zip(states, txs, strict=True):
        held = getattr(state.nu, "codes", state.nu)["params"]["kernel"].value
        assert held.shape == kernel.shape
        assert held.sharding.is_equivalent_to(kernel.sharding, 2)
        updates, new = wait(jax.jit(tx.update))(params, state, params)
        assert np.all(updates["params"]["kernel"].value != 0)
        one = jax.device_get(params)
        _, want = jax.jit(tx.update)(one, jax.jit(tx.init)(one), one)
        assert_near(jax.device_get(new), want, 0 if tx.part.variant.storage.draws else 1e-6)
