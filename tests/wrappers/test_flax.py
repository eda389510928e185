"""Training Flax models: NNX and linen, with checkpoints of the state by Orbax."""

from flax import linen, nnx
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from rmsprop_jax import RMSPropState, rmsprop

FULL = {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "bias_correction": True}
X = jnp.linspace(-1, 1, 32).reshape(8, 4)
Y = jnp.sin(X).sum(axis=1, keepdims=True)


def expected(params, loss, n):
    """n steps on the bare tree of parameters."""
    tx = rmsprop(0.01, **FULL)
    state = tx.init(params)
    for _ in range(n):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want)


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.hidden(x))))

    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params, rest)(X) - Y) ** 2)

    want = expected(params, loss, 4)
    optimizer = nnx.Optimizer(model, rmsprop(0.01, **FULL), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(4):
        step(model, optimizer)
    assert_same(nnx.state(model, nnx.Param), want)


def test_nnx_names_the_leaf_that_does_not_fit():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = rmsprop(0.1)
    state = tx.init(params)
    wrong = jax.tree.map(lambda leaf: leaf[None], params)
    with pytest.raises(AssertionError, match=r"bias.*\[1, 2\].*\[2\]"):
        tx.update(wrong, state)


def test_linen_train_state():
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), X)

    def loss(params):
        return jnp.mean((model.apply(params, X) - Y) ** 2)

    state = TrainState.create(apply_fn=model.apply, params=params, tx=rmsprop(0.01, **FULL))
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    for _ in range(4):
        state = step(state)
    assert_same(state.params, expected(params, loss, 4))


def test_orbax_round_trip(tmp_path):
    """Every field, None and count included, returns with its type; training goes on from there."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}
    for name, form in (("plain", {}), ("full", FULL)):
        tx = rmsprop(0.1, **form)
        _, state = tx.update(params, tx.init(params), params)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, state)
            checkpointer.wait_until_finished()
            target = jax.eval_shape(tx.init, params)
            restored = checkpointer.restore(tmp_path / name, target)
        assert type(restored) is RMSPropState
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        got, want = tx.update(params, restored, params), tx.update(params, state, params)
        jax.tree.map(np.testing.assert_array_equal, got, want)
