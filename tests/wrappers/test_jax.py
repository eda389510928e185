"""Inside JAX's own transformations, in each storage."""

import functools

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_same, side_by_side
from rmsprop_jax import rmsprop
from rmsprop_jax._storage import slots_of
from storages import (
    FULL,
    GRADS,
    PARAMS,
    SHAPES,
    SLOTS,
    SMALL,
    STACKED,
    assert_as_plain,
    assert_near,
    each_storage,
    plain,
    run,
    run_each,
    slot,
    types,
)

FORMS = [
    {},
    {"eps_in_sqrt": False, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.9},
    {"bias_correction": True, "momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "cautious": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    FULL,
]
TXS = {f"float32 {form}": rmsprop(0.1, **form) for form in FORMS}
TXS |= {name: rmsprop(0.1, **FULL, storage=storage) for name, storage in SMALL.items()}


@functools.cache
def loops():
    """Parameters and state of each after four steps, each a call."""
    return run_each(TXS)


def step(tx, carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def rtol_of(name):
    """0 in 8 and 16 bits; else programs may contract products and sums."""
    return 2e-6 if name.startswith("float32") else 0


def assert_as_loops(subtests, got):
    for name, want in loops().items():
        with subtests.test(tx=name):
            assert_near(got[name], want, rtol_of(name))


def test_scan(subtests):
    def one(tx):
        def body(carry, grads):
            return step(tx, carry, grads), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), STACKED)[0]

    assert_as_loops(subtests, jax.jit(lambda: {name: one(tx) for name, tx in TXS.items()})())


def test_while(subtests):
    stacked = jax.tree.map(jnp.asarray, STACKED)

    def one(tx):
        def not_done(loop):
            turns, (_, state) = loop
            return (state.count < len(GRADS)) & (turns < 9)

        def body(loop):
            turns, carry = loop
            grads = jax.tree.map(lambda g: g[carry[1].count], stacked)
            return turns + 1, step(tx, carry, grads)

        return jax.lax.while_loop(not_done, body, (0, (PARAMS, tx.init(PARAMS))))[1]

    assert_as_loops(subtests, jax.jit(lambda: {name: one(tx) for name, tx in TXS.items()})())


def test_cond(subtests):
    @jax.jit
    def maybe(flag, carries, grads):
        return {
            name: jax.lax.cond(
                flag, functools.partial(step, tx), lambda c, _: c, carries[name], grads
            )
            for name, tx in TXS.items()
        }

    carries = {name: (PARAMS, tx.init(PARAMS)) for name, tx in TXS.items()}
    for grads in GRADS:
        assert_same(maybe(False, carries, grads), carries)
        carries = maybe(True, carries, grads)
    assert_as_loops(subtests, carries)


def test_vmap_over_models(subtests):
    """A batch of models, each with its own state, is trained as if one by one."""

    def scaled(tree):
        return jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), tree)

    @jax.jit
    def run(params, grads):
        return {
            name: jax.lax.scan(
                lambda carry, g, tx=tx: (jax.vmap(functools.partial(step, tx))(carry, g), None),
                (params, jax.vmap(tx.init)(params)),
                grads,
            )[0]
            for name, tx in TXS.items()
        }

    batch = jax.device_get(run(scaled(PARAMS), jax.vmap(scaled)(STACKED)))
    assert_as_loops(subtests, jax.tree.map(lambda leaf: leaf[0], batch))
    for i, scale in enumerate((1, -1, 2)):
        params, grads = (jax.tree.map(lambda a, s=scale: s * a, t) for t in (PARAMS, GRADS))
        for name, want in run_each(TXS, params, grads).items():
            with subtests.test(tx=name, model=i):
                got = jax.tree.map(lambda leaf, i=i: leaf[i], batch[name])
                assert_near(got, want, 2e-6)


@each_storage
def test_outside_jit(storage):
    carry = (PARAMS, rmsprop(0.1, **FULL, storage=storage).init(PARAMS))
    for grads in GRADS:
        carry = step(rmsprop(0.1, **FULL, storage=storage), carry, grads)
    assert_as_plain(carry, storage, rtol=2e-6)


def test_outside_jit_in_every_form(subtests):
    for form in FORMS:
        with subtests.test(form=form):
            tx = rmsprop(0.1, **form)
            carry = (PARAMS, tx.init(PARAMS))
            for grads in GRADS:
                carry = step(tx, carry, grads)
            assert_near(carry, loops()[f"float32 {form}"], 2e-6)


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
        at = (np.float64(0.05), np.float64(0.8))
        value, gradient = jax.jit(loss_after), jax.jit(jax.grad(loss_after, argnums=(0, 1)))
        tangents = jax.jit(lambda at, t: jax.jvp(loss_after, at, t)[1])
        got = gradient(*at)
        assert all(got)
        for i in range(2):
            h = 1e-6
            ends = [value(*(v + s * h * (i == j) for j, v in enumerate(at))) for s in (1, -1)]
            np.testing.assert_allclose(got[i], (ends[0] - ends[1]) / (2 * h), rtol=1e-7)
            tangent = tuple(np.float64(i == j) for j in range(2))
            np.testing.assert_allclose(tangents(at, tangent), got[i], rtol=1e-12)


@each_storage
def test_an_update_has_a_derivative(storage):
    """Without momentum it is linear in the learning rate."""

    @jax.jit
    @jax.value_and_grad
    def total(learning_rate):
        tx = rmsprop(learning_rate, centered=True, storage=storage)
        return optax.tree.sum(tx.update(GRADS[0], tx.init(PARAMS))[0])

    value, derivative = total(0.1)
    np.testing.assert_allclose(0.1 * derivative, value, rtol=1e-5)
    assert value != 0


def test_export_round_trip(subtests):
    """Of one program of all: each state is serialized."""
    args = [dict.fromkeys(TXS, GRADS[0]), {name: state for name, (_, state) in loops().items()}]
    args.append(dict.fromkeys(TXS, PARAMS))
    update = jax.jit(side_by_side(TXS).update)
    restored = export.deserialize(export.export(update)(*args).serialize())
    got, want = restored.call(*args), update(*args)
    for name in TXS:
        with subtests.test(tx=name):
            for a, b in zip(got, want, strict=True):
                assert_near(a[name], b[name], rtol_of(name))


@each_storage
def test_no_two_buffers_are_shared_and_all_can_be_donated(storage):
    tx = rmsprop(0.1, **FULL, storage=storage)
    for init in (tx.init, jax.jit(tx.init)):
        leaves = jax.tree.leaves((PARAMS, init(PARAMS)))
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

    donating = jax.jit(functools.partial(step, tx), donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    arrays = jax.tree.leaves(carry)
    compiled = donating.lower(carry, GRADS[0]).compile()
    wanted = sum(leaf.nbytes for leaf in arrays)
    assert compiled.memory_analysis().alias_size_in_bytes >= wanted
    for grads in GRADS:
        carry = donating(carry, grads)
    assert all(array.is_deleted() for array in arrays)
    assert_as_plain(carry, storage, rtol=2e-6)


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
        *(
            {"momentum": 0.9, "nesterov": nesterov, "cautious": cautious, **others}
            for nesterov, cautious in ((True, False), (False, True), (True, True))
            for others in (
                {},
                {"eps_in_sqrt": False, "lr_in_momentum": False, "weight_decay": 0.1},
                {"centered": True, "bias_correction": True},
                {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr_in_momentum": False},
            )
        ),
    ],
    ids=str,
)
def test_a_donated_step_needs_no_memory_beside_its_buffers(form):
    """XLA:CPU copies a slot that it computes twice; the order of operations prevents that."""
    tx = rmsprop(0.1, **form)
    x = [jnp.ones(1 << 16), jnp.ones((300, 170))]
    carry = (x, tx.init(x))
    donating = jax.jit(functools.partial(step, tx), donate_argnums=0)
    program = donating.lower(carry, x).compile()
    assert "sqrt(" in program.as_text()
    memory = program.memory_analysis()
    arrays = [leaf for leaf in jax.tree.leaves(carry) if leaf.shape]
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
    def train(carry):
        traces.append(1)
        return step(tx, carry, GRADS[0])

    carry = (PARAMS, tx.init(PARAMS))
    for _ in range(3):
        carry = train(carry)
    assert len(traces) == 1


DTYPES = ["float16", "bfloat16", "float32", "float64"]


@each_storage
def test_the_form_of_the_state_depends_on_no_dtype_and_never_changes(storage, subtests):
    """In float32, it is that of the parameters' precision."""
    form = plain(storage)[1]
    with jax.enable_x64(True):
        tx = rmsprop(0.1, **FULL, storage=storage)
        for param_dtype in DTYPES:
            with subtests.test(params=param_dtype):
                params = {n: np.asarray(PARAMS[n]).astype(jnp.dtype(param_dtype)) for n in "wb"}
                state = tx.init(params)
                if storage is not None or param_dtype != "float64":
                    for field in SLOTS:
                        for name in params:
                            held, wanted = (slot(getattr(s, field), name) for s in (state, form))
                            assert types(held) == types(wanted)
                    assert state.weight_sum.dtype == jnp.float32
                for grad_dtype in DTYPES:
                    grads = {n: np.ones(SHAPES[n], jnp.dtype(grad_dtype)) for n in params}
                    updates, new = jax.eval_shape(tx.update, grads, state, params)
                    assert jax.tree.structure(new) == jax.tree.structure(state)
                    assert types(new) == types(state)
                    assert types(updates) == types(jax.tree.map(jnp.asarray, grads))


@each_storage
def test_numpy_and_python_leaves(storage):
    numpy = jax.tree.map(np.asarray, PARAMS)
    tx = rmsprop(0.1, **FULL, storage=storage)
    state = tx.init(numpy | {"s": float(PARAMS["s"])})
    assert_same(state, tx.init(PARAMS))
    _, new = jax.jit(tx.update)(jax.tree.map(np.asarray, GRADS[0]), state, numpy)
    assert_same(new, run(tx, grads=GRADS[:1])[1])


@each_storage
def test_abstract_and_empty_trees_and_leaves(storage):
    tx = rmsprop(0.1, **FULL, storage=storage)
    wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tx.init(PARAMS))
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    for shapes in (jax.eval_shape(tx.init, PARAMS), jax.eval_shape(tx.init, abstract)):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == wanted
    assert_same(tx.init(abstract), tx.init(PARAMS))
    for empty in ({}, (), None, {"a": None}):
        free = tx if empty is not None else rmsprop(0.1, momentum=0.9, storage=storage)
        updates, state = free.update(empty, free.init(empty), empty)
        assert updates == empty
        assert int(state.count) == 1
        assert types(state) == types(free.init(empty))
        assert all(leaf.size for leaf in jax.tree.leaves(state))  # Orbax stores no empty arrays
    for shape in ((0, 32), (4, 0)):
        updates, state = tx.update(jnp.ones(shape), tx.init(jnp.ones(shape)), jnp.ones(shape))
        assert updates.shape == slots_of(state.nu).shape == slots_of(state.trace).shape == shape


@each_storage
def test_a_gradient_of_none_leaves_the_state_of_its_leaf(storage, subtests):
    """Its scale too, where that is in one array with the others."""
    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = plain(storage)
    _, all_new = jax.jit(tx.update)(GRADS[0], state, params)
    for update in (tx.update, jax.jit(tx.update)):
        for without in ("w", "s", "wb"):
            with subtests.test(without=without, jit=update is not tx.update):
                updates, new = update(GRADS[0] | dict.fromkeys(without), state, params)
                assert types(new) == types(state)
                for name in SHAPES:
                    assert (updates[name] is None) == (name in without)
                    for field in SLOTS:
                        got, old, want = (
                            slot(getattr(one, field), name) for one in (new, state, all_new)
                        )
                        assert_near(got, old if name in without else want, 0 if storage else 2e-6)
                        with pytest.raises(AssertionError):
                            assert_near(old, want, 0)
