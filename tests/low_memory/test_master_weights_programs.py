"""Master weights in JAX's transformations, in Flax and in checkpoints."""

import functools

from flax import linen, nnx, serialization
from flax.training.train_state import TrainState
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from helpers import assert_same, side_by_side
from rmsprop_jax import low_memory, rmsprop
from storages import FULL, SMALL, types

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Optax and Flax

master_weights, join = low_memory.master_weights, low_memory.join_weights
RNG = np.random.default_rng(0)
DTYPES = {"w": "bfloat16", "b": "bfloat16", "s": "bfloat16", "f": "float32"}
SHAPES = {"w": (4, 32), "b": (16,), "s": (), "f": (3, 8)}
PARAMS = {name: jnp.asarray(RNG.standard_normal(SHAPES[name]), DTYPES[name]) for name in SHAPES}
STACKED = {
    name: jnp.asarray(RNG.standard_normal((5, *shape)) / 9, DTYPES[name])
    for name, shape in SHAPES.items()
}
GRADS = [jax.tree.map(lambda g, t=t: g[t], STACKED) for t in range(5)]
# Whatever a program fuses: a product with a half is exact.
EXACT = optax.chain(optax.trace(0.5), optax.scale(-0.5))
TXS = {f"{bits}": master_weights(EXACT, bits) for bits in (16, 24, 32)}
RULES = {
    f"{bits}, {name}": master_weights(rmsprop(0.1, **FULL, storage=storage), bits)
    for bits, (name, storage) in zip((16, 24, 32), ({"float32": None} | SMALL).items(), strict=True)
}
ALL = side_by_side(TXS)


def step(tx, carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def each(tree, txs=TXS):
    return dict.fromkeys(txs, tree)


@functools.cache
def looped():
    """Parameters and states of each after five steps, each a call."""
    carry, advance = (each(PARAMS), ALL.init(each(PARAMS))), jax.jit(functools.partial(step, ALL))
    for g in GRADS:
        carry = advance(carry, each(g))
    assert all(np.any(carry[0][name]["w"] != PARAMS["w"]) for name in TXS)
    return carry


def scanned(params, grads):
    carry = params, ALL.init(params)
    return jax.lax.scan(lambda carry, g: (step(ALL, carry, each(g)), None), carry, grads)[0]


def test_a_scan_has_the_bits_of_a_loop():
    assert_same(jax.jit(scanned)(each(PARAMS), STACKED), looped())


def test_outside_jit_and_unrolled_too():
    """An unrolled loop shows the compiler parameters that are rounded and widened again."""
    carry = each(PARAMS), ALL.init(each(PARAMS))
    for g in GRADS:
        carry = step(ALL, carry, each(g))
    assert_same(carry, looped())

    @jax.jit
    def unrolled(params):
        carry = params, ALL.init(params)
        for g in GRADS:
            carry = step(ALL, carry, each(g))
        return carry

    got, want = (
        [leaf for leaf in jax.tree.leaves(carry) if leaf.dtype != jnp.float32]  # sums may be merged
        for carry in (unrolled(each(PARAMS)), looped())
    )
    assert len(got) == 3 * 3 + 2 * 3 + 3
    assert_same(got, want)


def test_vmap_trains_each_as_alone():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), (each(PARAMS), STACKED))
    both = jax.jit(jax.vmap(scanned))(*stacked)
    assert_same(jax.tree.map(lambda leaf: leaf[0], both), looped())


def test_cond_and_jit_of_init():
    fresh = jax.jit(ALL.init)(each(PARAMS))
    assert_same(fresh, ALL.init(each(PARAMS)))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), each(PARAMS))
    assert_same(ALL.init(shapes), fresh)

    @jax.jit
    def maybe(flag, carry, g):
        return jax.lax.cond(flag, functools.partial(step, ALL), lambda carry, _: carry, carry, g)

    carry = each(PARAMS), fresh
    for g in GRADS:
        assert_same(maybe(False, carry, each(g)), carry)
        carry = maybe(True, carry, each(g))
    assert_same(carry, looped())


def test_all_buffers_are_donated():
    carry = jax.tree.map(jnp.copy, (each(PARAMS), ALL.init(each(PARAMS))))
    leaves = jax.tree.leaves(carry)
    fresh = jax.tree.leaves((PARAMS, TXS["24"].init(PARAMS)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in fresh}) == len(fresh)
    donating = jax.jit(functools.partial(step, ALL), donate_argnums=0)
    for g in GRADS:
        carry = donating(carry, each(g))
    assert all(leaf.is_deleted() for leaf in leaves)
    assert_same(carry, looped())


def test_export_round_trip():
    """Of leaves with and without corrections, which the state says by a node of Optax."""
    tx, params, grads = side_by_side(RULES), each(PARAMS, RULES), each(GRADS[0], RULES)
    update, state = jax.jit(tx.update), tx.init(params)
    restored = export.deserialize(export.export(update)(grads, state, params).serialize())
    assert_same(restored.call(grads, state, params), update(grads, state, params))


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_derivatives_are_those_in_float32(bits):
    """By the rate, through two steps with weight decay: rounding has none."""

    def loss(rate, wrap, dtype):
        tx, x = wrap(rmsprop(rate, weight_decay=0.1)), jnp.asarray([1.0, -0.5], dtype)
        state = tx.init(x)
        for _ in range(2):
            x, state = step(tx, (x, state), 3 * x)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    got = jax.grad(loss)(0.05, lambda tx: master_weights(tx, bits), jnp.bfloat16)
    want = jax.grad(loss)(0.05, lambda tx: tx, jnp.float32)
    np.testing.assert_allclose(got, want, 0.05)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.gain = nnx.Param(jnp.float32(2))
        self.hidden = nnx.Linear(16, 64, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.gain[...] * self.hidden(x)


X = jnp.linspace(-1, 1, 64).reshape(4, 16)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("jit", [False, True])
def test_an_optimizer_of_nnx(jit, bits, tmp_path):
    """As a plain loop on its variables, and from a checkpoint."""

    def fresh():
        model = Model()
        return model, nnx.Optimizer(model, master_weights(EXACT, bits), wrt=nnx.Param)

    def train(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    train = nnx.jit(train) if jit else train
    model, optimizer = fresh()
    tx, start = optimizer.tx, jax.tree.leaves(nnx.state(model, nnx.Param))
    params = {"gain": start[0], "hidden": {"bias": start[1], "kernel": start[2]}}
    carry = params, tx.init(params)
    for _ in range(3):
        train(model, optimizer)
        carry = step(tx, carry, carry[0])
    assert {leaf.dtype.name for leaf in start} == {"float32", "bfloat16"}
    got = jax.tree.leaves((nnx.state(model, nnx.Param), optimizer.opt_state))
    assert_same(got, jax.tree.leaves(carry))
    weights = join(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert_same(jax.tree.leaves(weights), jax.tree.leaves(join(*carry)))

    state = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    other = fresh()
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "state", nnx.state(other)))
    assert_same(nnx.state(other), state)


def test_linen_train_state_and_its_bytes(subtests):
    model = linen.Dense(16, param_dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), X) | {"f": jnp.ones(3)}
    for bits in (16, 24, 32):
        with subtests.test(bits=bits):
            tx = master_weights(rmsprop(0.1, **FULL), bits)
            fresh = state = TrainState.create(apply_fn=None, params=params, tx=tx)
            advance = jax.jit(lambda state: state.apply_gradients(grads=state.params))
            for _ in range(3):
                before = types(state.opt_state)
                state = advance(state)
                assert types(state.opt_state) == before
            assert types(state.params) == types(params)
            restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
            assert_same(restored.opt_state, state.opt_state)
            assert_same(advance(restored).params, advance(state).params)


def test_orbax_brings_back_what_was_saved(tmp_path):
    tx = side_by_side(RULES)
    advance = jax.jit(functools.partial(step, tx))
    carry = each(PARAMS, RULES), tx.init(each(PARAMS, RULES))
    for g in GRADS[:3]:
        carry = advance(carry, each(g, RULES))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "3", carry)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "3", jax.eval_shape(lambda: carry))
    assert_same(restored, carry)
    assert_same(advance(restored, each(GRADS[3], RULES)), advance(carry, each(GRADS[3], RULES)))


def test_one_trace_serves_every_step_and_every_leaf_of_a_shape():
    tx, tree = master_weights(rmsprop(0.1)), [jnp.ones((3, 5), jnp.bfloat16)] * 20
    text = jax.jit(tx.update).lower(tree, tx.init(tree), tree).as_text()
    assert text.count("func.func private @moved") == 1
    assert text.count("call @moved") == 20
    traces = []

    @jax.jit
    def train(carry):
        traces.append(1)
        return step(tx, carry, tree)

    carry = tree, tx.init(tree)
    for _ in range(3):
        carry = train(carry)
    assert len(traces) == 1
