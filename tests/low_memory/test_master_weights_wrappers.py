"""Master weights inside and around other transformations, and what they refuse."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_same, side_by_side
from rmsprop_jax import convert, describe, dialects, low_memory, rmsprop
from rmsprop_jax._rule import is_ours
from storages import FULL, SMALL, ours, types

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Optax

master_weights, join = low_memory.master_weights, low_memory.join_weights
BITS = (16, 24, 32)
# Whatever a program fuses: a product with a half is exact.
EXACT = optax.chain(optax.trace(0.5), optax.scale(-0.5))
SHAPES = {"w": (4, 32), "b": (16,), "s": ()}
DTYPES = {"w": "bfloat16", "b": "bfloat16", "s": "float32"}
RNG = np.random.default_rng(0)


def of_each(make):
    return {name: jnp.asarray(make(shape), DTYPES[name]) for name, shape in SHAPES.items()}


PARAMS = of_each(RNG.standard_normal)
GRADS = [
    of_each(lambda s: RNG.standard_normal(s) * 10.0 ** RNG.integers(-4, 0, s)) for _ in range(4)
]
EVERYWHERE = dict.fromkeys(SHAPES, True)


def step(tx, carry, grads, **extra):
    params, state = carry
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def run_each(txs, grads=GRADS, params=PARAMS):
    """{name: (parameters, state)} after some steps of one program, whose types never change."""
    tx = side_by_side(txs)
    advance = jax.jit(functools.partial(step, tx))
    carry = dict.fromkeys(txs, params), tx.init(dict.fromkeys(txs, params))
    for g in grads:
        before = types(carry)
        carry = advance(carry, dict.fromkeys(txs, g))
        assert types(carry) == before
    return {name: (carry[0][name], carry[1][name]) for name in txs}


def run(tx, grads=GRADS, params=PARAMS):
    return run_each({"": tx}, grads, params)[""]


def held(state):
    """The only state of master weights in a state."""
    kind = type(master_weights(EXACT).init(jnp.ones(1)))
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    (one,) = (node for node in found if isinstance(node, kind))
    return one


def inject(make):
    """Hyperparameters in the state, of a learning rate that is exact."""
    return optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=0.5)


def exact(learning_rate):
    return optax.chain(optax.trace(0.5), optax.scale(-learning_rate))


AROUND = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("rms", tx)),
    "masked": lambda tx: optax.masked(tx, EVERYWHERE),
    "partition": lambda tx: optax.partition({"a": tx}, dict.fromkeys(SHAPES, "a")),
    "extra_args": optax.with_extra_args_support,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "parts": lambda tx: optax.partition({"a": tx, "b": tx}, {"w": "a", "b": "b", "s": "a"}),
}
INSIDE = AROUND | {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
}


@pytest.mark.parametrize("bits", BITS)
def test_a_wrapper_that_lets_everything_through_changes_no_bit(bits, subtests):
    txs = {f"around: {name}": wrap(master_weights(EXACT, bits)) for name, wrap in AROUND.items()}
    txs |= {f"inside: {name}": master_weights(wrap(EXACT), bits) for name, wrap in INSIDE.items()}
    txs["around: inject"] = inject(lambda rate: master_weights(exact(rate), bits))
    txs["inside: inject"] = master_weights(inject(exact), bits)
    txs["inside: flatten"] = master_weights(optax.flatten(EXACT), bits)
    txs["alone"] = master_weights(EXACT, bits)
    runs = run_each(txs)
    want, state = runs["alone"]
    assert np.any(want["w"] != PARAMS["w"])
    weights = join(want, state)
    for name, (params, other) in runs.items():
        with subtests.test(name=name):
            assert_same(params, want)
            assert_same(join(params, other), weights)
            if "parts" not in name:
                assert_same(held(other).corrections, state.corrections)


def test_around_it_flatten_leaves_no_bfloat16_beside_float32():
    """As the docstring warns: one array of float32 reaches it."""
    assert {x.dtype for x in PARAMS.values()} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("standard"):
        state = optax.flatten(master_weights(EXACT)).init(PARAMS)
    assert not jax.tree.leaves(state.corrections)


def test_the_inner_sees_float32_and_the_others_as_they_are():
    seen = []

    def update(grads, state, params):
        seen.append([{n: x.dtype for n, x in tree.items()} for tree in (grads, params)])
        return jax.tree.map(jnp.zeros_like, grads), state

    tx = master_weights(optax.GradientTransformation(lambda _: (), update))
    params = PARAMS | {"i": jnp.arange(3), "c": jnp.ones(2, jnp.complex64)}
    grads = GRADS[0] | {"i": np.zeros(3, jax.dtypes.float0), "c": jnp.ones(2, jnp.complex64)}
    updates, state = tx.update(grads, tx.init(params), params)
    for got in seen[0]:
        assert {got[name] for name in PARAMS} == {jnp.dtype("float32")}
    assert seen[0][1]["i"] == jnp.int32
    assert updates["c"].dtype == jnp.complex64
    nothing = optax.MaskedNode()
    assert {name: state.corrections[name] for name in "sic"} == dict.fromkeys("sic", nothing)


@pytest.mark.parametrize("bits", BITS)
def test_a_skipped_step_changes_nothing_but_the_count(bits, subtests):
    tx = master_weights(optax.apply_if_finite(rmsprop(0.1, **FULL), 5), bits)
    carry = run(tx)
    for bad in (jnp.nan, jnp.inf):
        with subtests.test(bad=bad):
            broken = GRADS[0] | {"b": GRADS[0]["b"].at[3].set(bad)}
            params, state = jax.jit(functools.partial(step, tx))(carry, broken)
            assert_same(params, carry[0])
            assert_same(state.corrections, carry[1].corrections)
            assert_same(ours(state), ours(carry[1]))
            assert int(state.inner_state.total_notfinite) == 1
            assert int(state.count) == len(GRADS) + 1


@pytest.mark.parametrize("bits", BITS)
def test_multi_steps_inside_gathers_in_float32(bits):
    """Two halves of a gradient that bfloat16 does not have; nothing moves in between."""
    tx = master_weights(optax.MultiSteps(optax.sgd(1.0), 2), bits)
    params = jnp.ones(256, jnp.bfloat16)
    halves = jnp.asarray([0.25, 2.0**-10], jnp.bfloat16)[:, None] * jnp.ones(256, jnp.bfloat16)
    first = run(tx, halves[:1], params)
    np.testing.assert_array_equal(first[0], params)
    got = np.float64(join(*run(tx, halves, params)))
    want = 1 - (0.25 + 2.0**-10) / 2
    unit = {16: 2.0**-8, 24: 2.0**-16, 32: 0}[bits]
    assert np.all(abs(got - want) <= unit)
    assert abs(got.mean() - want) <= 4 * unit / 2 / 16


@pytest.mark.parametrize("bits", BITS)
def test_a_gradient_of_none_leaves_its_leaf(bits):
    tx = master_weights(rmsprop(0.1), bits)
    params, state = run(tx)
    updates, new = jax.jit(tx.update)(GRADS[0] | {"w": None}, state, params)
    assert updates["w"] is None
    assert np.any(updates["b"])
    if bits > 16:
        assert_same(new.corrections["w"], state.corrections["w"])
        assert np.any(new.corrections["b"] != state.corrections["b"])
    assert types(new) == types(state)
    # What is not trained may be None among the parameters, as in a partition of LoRA's.
    some, grads = PARAMS | {"w": None}, [g | {"w": None} for g in GRADS]
    got, want = run(tx, grads, some), run(tx)
    for name in "bs":
        assert_same(got[0][name], want[0][name])


def test_masked_leaves_have_nothing():
    tx = optax.masked(master_weights(EXACT), {"w": True, "b": False, "s": False})
    params, state = run(tx)
    want, other = run(master_weights(EXACT))
    assert_same(params["w"], want["w"])
    assert isinstance(held(state).corrections["b"], optax.MaskedNode)
    assert_same(join(params, state)["w"], join(want, other)["w"])
    assert join(params, state)["b"].dtype == jnp.float32


def test_equal_arguments_make_equal_transformations():
    inner = rmsprop(0.1)
    tx = master_weights(inner, 24, 7)
    same = [master_weights(rmsprop(0.1), 24, np.int64(7)), copy.deepcopy(tx), copy.copy(tx)]
    for other in (*same, pickle.loads(pickle.dumps(tx))):
        assert other == tx
        assert hash(other) == hash(tx)
    for other in ((inner,), (inner, 32, 7), (inner, 24, 8), (rmsprop(0.2), 24, 7)):
        assert master_weights(*other) != tx
    adam = optax.adam(0.1)
    assert master_weights(adam) == master_weights(adam)


def test_describe_says_so(subtests):
    tx = rmsprop(0.1, storage=SMALL["q8"])
    wrapped = {f"inside: {name}": master_weights(wrap(tx)) for name, wrap in INSIDE.items()}
    wrapped |= {f"around: {name}": wrap(master_weights(tx)) for name, wrap in AROUND.items()}
    for name, one in wrapped.items():
        with subtests.test(name=name):
            text = describe(one, PARAMS)
            assert text.startswith(describe(tx) + "\nwith master weights of 24 bits")
            assert text.count("master") == 1
    both = optax.partition({"a": master_weights(tx, 16), "b": tx}, {"w": "a", "b": "b", "s": "a"})
    first, second = describe(both, PARAMS).split("\n\n")
    assert [text.count("16 bits") for text in (first, second)] == [1, 0]


def test_map_params_and_get_find_the_corrections():
    tx = optax.chain(optax.clip(1.0), master_weights(rmsprop(0.1)))
    _, state = run(tx)
    assert_same(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    seen = []
    optax.tree.map_params(tx, lambda leaf: seen.append(leaf) or leaf, state)
    inner = held(state)
    wanted = jax.tree.leaves((inner.corrections, inner.inner_state.nu))
    assert {id(leaf) for leaf in seen} == {id(leaf) for leaf in wanted}
    assert optax.tree.get(state, "corrections") is inner.corrections


@pytest.mark.parametrize("bits", BITS)
def test_a_float32_checkpoint_of_pytorch_goes_on(bits):
    tx = master_weights(dialects.pytorch(lr=0.01, momentum=0.9), bits)
    group = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "params": [0, 1, 2]}
    group |= {"momentum": 0.9, "centered": False}
    theirs = {
        i: {
            "step": 5,
            "square_avg": RNG.uniform(1, 2, shape).astype(np.float32),
            "momentum_buffer": RNG.standard_normal(shape).astype(np.float32),
        }
        for i, shape in enumerate(SHAPES.values())
    }
    mapping = {name: i for i, name in enumerate(SHAPES)}
    weights = {name: jnp.float32(RNG.standard_normal(shape)) for name, shape in SHAPES.items()}
    state = convert.from_pytorch({"state": theirs, "param_groups": [group]}, PARAMS, mapping, tx)
    params, state = low_memory.split_weights(weights, PARAMS, state)
    assert types(params) == types(PARAMS)
    got, inner = join(params, state), state.inner_state
    assert state.count == inner.count == 5
    for i, name in enumerate(SHAPES):
        np.testing.assert_array_equal(inner.nu[name], theirs[i]["square_avg"])
        unit = 2.0**-bits * (bits < 32) * (name != "s") * 2.0**8
        assert np.all(abs(got[name] - weights[name]) <= unit * abs(weights[name]))
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    moved = join(*jax.jit(functools.partial(step, tx))((params, state), grads))
    plain = dialects.pytorch(lr=0.01, momentum=0.9)
    want = plain.update(jax.tree.map(jnp.float32, grads), inner, got)[0]
    for name in SHAPES:
        tolerance = 2.0 ** (8 - bits) if bits < 32 and name != "s" else 2.0**-22
        np.testing.assert_allclose(moved[name], got[name] + want[name], 2 * tolerance, 1e-6)
    back = convert.to_pytorch(state, PARAMS, mapping, tx, param_groups=[group])
    np.testing.assert_array_equal(back["state"][0]["square_avg"], theirs[0]["square_avg"])
    narrow = master_weights(dialects.pytorch(lr=0.01, momentum=0.9, storage=SMALL["q8"]), bits)
    changed = convert.change_storage(state, PARAMS, narrow)
    assert_same(changed.corrections, state.corrections)
    assert is_ours(changed.inner_state)


@pytest.mark.parametrize("bits", [24, 32])
def test_split_undoes_join(bits, subtests):
    tx = optax.chain(optax.clip(1.0), master_weights(rmsprop(0.1), bits))
    params, state = run(tx)
    for jit in (False, True):
        with subtests.test(jit=jit):
            undo = jax.jit(low_memory.split_weights) if jit else low_memory.split_weights
            got, new = undo(join(params, state), params, state)
            assert_same(got, params)
            assert_same(new, state)
    bad = join(params, state) | {"b": jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 3.4e38] * 4)}
    got, new = low_memory.split_weights(bad, params, state)
    again = join(got, new)["b"]
    np.testing.assert_array_equal(again[:3], bad["b"][:3])
    np.testing.assert_allclose(again[3], 3.396e38, 1e-3)


BAD_ARGUMENTS = {
    "bits must be 16, 24 or 32, got 8": (ValueError, (EXACT, 8)),
    "bits must be an integer, got '24'": (TypeError, (EXACT, "24")),
    "bits must be an integer, got True": (TypeError, (EXACT, True)),
    "seed must be an integer, got 0.5": (TypeError, (EXACT, 24, 0.5)),
    "tx must be a gradient transformation, got 3": (TypeError, (3,)),
    "tx must be a gradient transformation, got None": (TypeError, (None,)),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    error, args = BAD_ARGUMENTS[message]
    with pytest.raises(error, match=f"^{message}$"):
        master_weights(*args)


def test_what_does_not_fit_is_refused(subtests):
    p = {"w": jnp.ones(3, jnp.bfloat16)}
    narrow, wide = {"a": {"w": jnp.ones(3, jnp.float16)}}, {"w": jnp.ones(3)}
    tx, other = master_weights(rmsprop(0.1)), master_weights(rmsprop(0.1), 32)
    state = tx.init(p)
    calls = {
        "needs the parameters": (ValueError, tx.update, p, state),
        "must be a MasterWeightsState, got RMSProp": (TypeError, tx.update, p, state[2], p),
        r"'a/w' must be bfloat16, or have 32 bits.*float16\[3\].*masked": (
            TypeError,
            tx.init,
            narrow,
        ),
        r"of parameter 'w'.*int16\[3\] for bits=32, got int8": (
            ValueError,
            other.update,
            p,
            state,
            p,
        ),
        r"'w'.*must be none for bits=24, got int8": (ValueError, tx.update, p, state, wide),
        r"'w'.*int8\[3\] for bits=24, got none": (ValueError, tx.update, p, tx.init(wide), p),
        r"missing \['w'\], unexpected \['v'\]": (AssertionError, tx.update, {"v": 1.0}, state, p),
        r"float32\[2\].*bfloat16\[3\]": (AssertionError, tx.update, {"w": jnp.ones(2)}, state, p),
        "contains no master weights, got RMSPropState": (ValueError, join, p, state[2]),
        r"corrections of \['w'\]": (ValueError, join, {"v": p["w"]}, state),
    }
    for message, (error, f, *args) in calls.items():
        with subtests.test(message=message), pytest.raises(error, match=message):
            f(*args)


@pytest.mark.parametrize("name", sorted(set(INSIDE) - set(AROUND)))
def test_what_branches_must_be_inside(name):
    """Around, a branch of their own has the gradients' dtype: JAX names both."""
    tx = INSIDE[name](master_weights(rmsprop(0.1)))
    with pytest.raises(TypeError, match=r"(?s)cond branches.*float32.*bfloat16"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    wide = jax.tree.map(jnp.float32, GRADS[0])
    tx.update(wide, tx.init(PARAMS), PARAMS)  # gradients in float32 are theirs and ours
