"""Flax: boxed parameters, train states that contain integers, and copied optimizers."""

import copy
import functools

import chex
from flax import linen as nn
from flax import nnx, serialization
from flax.cursor import cursor
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import optax
import pytest

import rmsprop_jax

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]

X = jnp.linspace(-1, 1, 128).reshape(8, 16)


class MLP(nn.Module):
    """As in Flax's guide to many devices: each kernel is in a box, with names of mesh axes."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Dense(16, kernel_init=kernel)(x)
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None))
        return nn.Dense(16, kernel_init=kernel, use_bias=False)(jnp.tanh(x))


def create(tx):
    params = MLP().init(jax.random.key(0), X)["params"]
    return TrainState.create(apply_fn=MLP().apply, params=params, tx=tx)


def step(state, x):
    def loss_of(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - jnp.sin(3 * x)) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(state, step):
    losses = []
    for _ in range(10):
        state, loss = jax.block_until_ready(step(state, X))
        losses.append(loss)
    return nn.meta.unbox(state.params), losses


def test_training_in_boxes_is_that_with_optax(form):
    """Measured: 1e-7."""
    ours, theirs = (
        train(create(rms(0.01, **form)), jax.jit(step))
        for rms in (rmsprop_jax.rmsprop, optax.rmsprop)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=5e-6)


def test_specs_of_a_state_are_those_in_its_boxes():
    tx = rmsprop_jax.rmsprop(0.01, centered=True, momentum=0.9, bias_correction=True)
    specs = nn.get_partition_spec(jax.eval_shape(functools.partial(create, tx)))
    want = {"Dense_0": {"bias": P(), "kernel": P(None, "model")}}
    want["Dense_1"] = {"kernel": P("model", None)}
    assert specs.params == want
    assert specs.opt_state == rmsprop_jax.RMSPropState(P(), want, want, want, P())


def test_training_on_many_devices_is_that_with_optax(form):
    """Created and trained under the shardings of the boxes, as in Flax's guide. Measured: 7e-7."""
    auto = (AxisType.Auto,)  # linen leaves the places of what is between to the compiler
    mesh = jax.make_mesh((4,), ("model",), auto, devices=jax.devices()[:4])

    def run(tx):
        build = functools.partial(create, tx)
        places = nn.get_sharding(jax.eval_shape(build), mesh)
        state = jax.jit(build, out_shardings=places)()
        return train(
            state, jax.jit(step, in_shardings=(places, None), out_shardings=(places, None))
        )

    ours, theirs = (run(rms(0.01, **form)) for rms in (rmsprop_jax.rmsprop, optax.rmsprop))
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=5e-6)


def test_a_train_state_may_have_integers_among_its_parameters():
    """As in Flax's own tests, which look into train states and write them, but do not train."""
    params = {"a": 1, "b": (2, 3), "w": jnp.ones(3)}
    tx = rmsprop_jax.rmsprop(0.01, momentum=0.9)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    assert state.opt_state.nu["a"] is None
    assert cursor(state).params["b"][0].set(10).params["b"] == (10, 3)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.opt_state, state.opt_state)


@pytest.mark.parametrize("rmsprop", [rmsprop_jax.rmsprop, optax.rmsprop], ids=["ours", "theirs"])
def test_the_copy_of_an_optimizer_runs_the_same_program(rmsprop):
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model))

    model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(0.01, momentum=0.9), wrt=nnx.Param)
    step(model, optimizer)
    copies = copy.deepcopy((model, optimizer))
    step(model, optimizer)
    step(*copies)
    assert len(traces) == 1
    chex.assert_trees_all_equal(*map(nnx.state, (model, copies[0])))
    chex.assert_trees_all_equal(*map(nnx.state, (optimizer, copies[1])))
