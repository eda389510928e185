"""Inside JAX's own transformations and under its strictest settings."""

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import rmsprop

FORMS = [
    {},
    {"eps_in_sqrt": False, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.9},
    {"bias_correction": True, "momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "cautious": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]
GRADS = {"w": jnp.asarray([[1.0, -2.0, 0.5]]), "b": jnp.float32(-3.0)}
PARAMS = {"w": jnp.asarray([[0.1, 0.2, 0.3]]), "b": jnp.float32(1.0)}


def loop(tx, n):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(n):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(got, want, rtol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-7), got, want)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scan(form):
    tx = rmsprop(0.1, **form)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        return (optax.apply_updates(params, updates), state), None

    got, _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=4)
    assert_same(got, loop(tx, 4))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cond_and_while(form):
    tx = rmsprop(0.1, **form)
    state = tx.init(PARAMS)

    @jax.jit
    def maybe(flag):
        return jax.lax.cond(flag, lambda: tx.update(GRADS, state, PARAMS), lambda: (GRADS, state))

    assert_same(maybe(True), tx.update(GRADS, state, PARAMS))
    assert_same(maybe(False), (GRADS, state))

    def body(carry):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    got = jax.lax.while_loop(lambda carry: carry[1].count < 3, body, (PARAMS, state))
    assert_same(got, loop(tx, 3))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_vmap_over_models(form):
    """A batch of models, each with its own state, is trained as if one by one."""
    tx = rmsprop(0.1, **form)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    grads = jax.tree.map(lambda g: jnp.stack([g, -g, 0.1 * g]), GRADS)
    state = jax.vmap(tx.init)(params)
    updates, _ = jax.vmap(tx.update)(grads, state, params)
    for i in range(3):
        one = [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (grads, params, updates)]
        assert_same(one[2], tx.update(one[0], tx.init(one[1]), one[1])[0])


def test_jvp_and_grad_agree_with_finite_differences():
    """A meta-gradient: the loss after three steps, differentiated by the learning rate."""

    def loss_after(learning_rate, decay):
        tx = rmsprop(learning_rate, decay, eps=1e-3, centered=True, momentum=0.9)
        x = jnp.asarray([1.0, -0.5])
        state = tx.init(x)
        for _ in range(3):
            updates, state = tx.update(jax.grad(lambda x: jnp.sum(x**4))(x), state)
            x = x + updates
        return jnp.sum(x**2)

    with jax.enable_x64(True):
        at = (jnp.float64(0.05), jnp.float64(0.8))
        got = jax.grad(loss_after, argnums=(0, 1))(*at)
        for i in range(2):
            h = 1e-6
            ends = [loss_after(*(v + s * h * (i == j) for j, v in enumerate(at))) for s in (1, -1)]
            np.testing.assert_allclose(got[i], (ends[0] - ends[1]) / (2 * h), rtol=1e-7)
            tangent = tuple(jnp.float64(i == j) for j in range(2))
            np.testing.assert_allclose(jax.jvp(loss_after, at, tangent)[1], got[i], rtol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_export_round_trip(form):
    tx = rmsprop(0.1, **form)
    state = tx.init(PARAMS)
    exported = export.export(jax.jit(tx.update))(GRADS, state, PARAMS)
    restored = export.deserialize(exported.serialize())
    assert_same(restored.call(GRADS, state, PARAMS), tx.update(GRADS, state, PARAMS))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_check_tracer_leaks", True),
        ("jax_enable_checks", True),
        ("jax_debug_nans", True),
        ("jax_debug_infs", True),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_enable_x64", True),
        ("jax_disable_jit", True),
    ],
)
def test_strict_settings(setting, value, jit, form):
    """Zeros among the gradients, a schedule that mixes dtypes, float16 beside complex64."""
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        tx = rmsprop(optax.cosine_decay_schedule(0.1, 10), **form)
        params = {
            "half": jnp.ones(3, jnp.float16),
            "single": jnp.ones((2, 2), jnp.float32),
            "complex": jnp.ones(3, jnp.complex64),
        }
        grads = {
            "half": jnp.asarray([0, 1, -300], jnp.float16),
            "single": jnp.asarray([[0, 1e-30], [1e30, 1]], jnp.float32),
            "complex": jnp.asarray([0, 1j, 1], jnp.complex64),
        }
        state = tx.init(params)
        update = jax.jit(tx.update) if jit else tx.update
        for _ in range(3):
            updates, state = update(grads, state, params)
        for name, leaf in updates.items():
            assert leaf.dtype == params[name].dtype
            assert bool(jnp.all(jnp.isfinite(leaf)))
    finally:
        jax.config.update(setting, before)


SIZE = 1 << 16


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"eps_in_sqrt": False},
        {"momentum": 0.9},
        {"momentum": 0.9, "lr_in_momentum": False},
        {"centered": True},
        {"centered": True, "momentum": 0.9},
        {"bias_correction": True, "momentum": 0.9},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.9},
    ],
    ids=str,
)
def test_a_donated_step_needs_no_memory_beside_its_buffers(form):
    """XLA:CPU copies a slot that it computes twice; the order of operations prevents that."""
    tx = rmsprop(0.1, **form)
    x = jnp.ones(SIZE)
    state = tx.init(x)

    def step(x, state, g):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, state, x).compile()
    memory = compiled.memory_analysis()
    arrays = [leaf for leaf in jax.tree.leaves((x, state)) if leaf.shape]
    assert memory.temp_size_in_bytes < 1024
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in arrays)


def test_a_traced_update_holds_the_rule_once_for_each_shape():
    tx = rmsprop(0.1, momentum=0.9)
    tree = [jnp.ones((3, 5))] * 50 + [jnp.ones(7)] * 50
    text = jax.jit(tx.update).lower(tree, tx.init(tree)).as_text()
    assert text.count("func.func private @step") == 2
    assert text.count("call @step") == 100


def test_one_trace_serves_every_step():
    traces = []
    tx = rmsprop(optax.cosine_decay_schedule(0.1, 10), **FORMS[3])

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1
