"""Every wrong argument, and the error that refuses it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import low_memory, rmsprop, scale_by_rms

INF, NAN = float("inf"), float("nan")

ARGUMENTS = [
    ({"learning_rate": NAN}, ValueError, "learning_rate must be finite in float32, got nan"),
    ({"learning_rate": INF}, ValueError, "learning_rate must be finite in float32, got inf"),
    ({"learning_rate": 1e39}, ValueError, "learning_rate must be finite in float32"),
    ({"learning_rate": None}, TypeError, "learning_rate must be a number, a scalar array or"),
    ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number.*got '1e-3'"),
    ({"learning_rate": True}, TypeError, "learning_rate must be a number.*got True"),
    ({"learning_rate": 1j}, TypeError, "learning_rate must be a number"),
    ({"learning_rate": np.complex64(1)}, TypeError, "learning_rate must be a real number"),
    ({"learning_rate": jnp.bool_(True)}, TypeError, "learning_rate must be a real number"),
    ({"learning_rate": np.ones(3)}, ValueError, r"learning_rate must be a scalar.*\(3,\)"),
    ({"learning_rate": jnp.ones((1,))}, ValueError, r"learning_rate must be a scalar.*\(1,\)"),
    ({"decay": 1.5}, ValueError, "decay must be >= 0 and <= 1, got 1.5"),
    ({"decay": -0.1}, ValueError, "decay must be >= 0 and <= 1, got -0.1"),
    ({"decay": np.float32(2)}, ValueError, "decay must be >= 0 and <= 1, got 2.0"),
    ({"decay": "x"}, TypeError, "decay must be a number.*got 'x'"),
    ({"decay": None}, TypeError, "decay must be a number.*got None"),
    ({"eps": -1}, ValueError, "eps must be >= 0 and finite in float32, got -1"),
    ({"eps": NAN}, ValueError, "eps must be >= 0 and finite in float32, got nan"),
    ({"momentum": -0.9}, ValueError, "momentum must be >= 0 and finite in float32, got -0.9"),
    ({"momentum": False}, TypeError, "momentum must be a number.*, or None for none, got False"),
    ({"weight_decay": -1e-4}, ValueError, "weight_decay must be >= 0 .*got -0.0001"),
    ({"initial_scale": -1.0}, ValueError, "initial_scale must be >= 0 .*got -1.0"),
    ({"initial_scale": True}, TypeError, "initial_scale must be a number or scalar array"),
    ({"initial_scale": lambda c: 1.0}, TypeError, "initial_scale must be a number or scalar"),
    ({"eps_in_sqrt": None}, TypeError, "eps_in_sqrt must be True or False, got None"),
    ({"centered": 1}, TypeError, "centered must be True or False, got 1"),
    ({"nesterov": 0.9}, TypeError, "nesterov must be True or False, got 0.9"),
    ({"bias_correction": "no"}, TypeError, "bias_correction must be True or False"),
    ({"lr_in_momentum": 0}, TypeError, "lr_in_momentum must be True or False, got 0"),
    ({"cautious": jnp.bool_(True)}, TypeError, "cautious must be True or False"),
    ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
    ({"split_complex": None}, TypeError, "split_complex must be True or False, got None"),
    ({"storage": "q8"}, TypeError, "storage must be a Storage, got 'q8'"),
    ({"storage": jnp.bfloat16}, TypeError, "storage must be a Storage"),
    ({"nesterov": True}, ValueError, "nesterov=True needs momentum"),
    ({"cautious": True}, ValueError, "cautious=True needs momentum"),
    (
        {"decoupled_weight_decay": True},
        ValueError,
        "decoupled_weight_decay=True needs weight_decay",
    ),
    ({"bias_correction": True, "initial_scale": 1.0}, ValueError, "initial_scale must be 0, got 1"),
    ({"bias_correction": True, "decay": 1}, ValueError, "bias_correction=True needs decay < 1"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), ARGUMENTS)
def test_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        rmsprop(**{"learning_rate": 0.1} | kwargs)


def test_arguments_of_scale_by_rms():
    with pytest.raises(ValueError, match="decay must be >= 0 and <= 1, got 2"):
        scale_by_rms(decay=2)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1), np.asarray(0.5)])
def test_numbers_of_every_kind_are_numbers(value):
    rmsprop(value, value, value, value, momentum=value, weight_decay=value)


def test_schedules_are_checked_when_they_speak():
    g = jnp.ones(2)
    for schedule, error, message in (
        (lambda count: 2.0, ValueError, "decay must be >= 0 and <= 1, got 2.0"),
        (lambda count: "x", TypeError, "decay must be a number or scalar array, got 'x'"),
        (lambda count: jnp.ones(3), ValueError, r"decay must be a scalar.*\(3,\)"),
        (lambda count: lambda: 1, TypeError, "decay must be a number or scalar array"),
        (lambda count: None, TypeError, "decay must be a number or scalar array, got None"),
    ):
        tx = rmsprop(0.1, decay=schedule)
        state = tx.init(g)
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(error, match=message):
                update(g, state)


def test_parameters_must_be_arrays_or_numbers(subtests):
    for leaf in ("weights", np.ones(2, object), np.asarray("weights"), jnp.tanh):
        with (
            subtests.test(leaf=str(leaf)),
            pytest.raises(TypeError, match="parameter 'layer/w' must be floating or complex, or"),
        ):
            rmsprop(0.1).init({"layer": {"w": leaf, "b": jnp.ones(2)}})


def test_numbers_without_sign_and_zero_are_refused_by_name():
    """float8_e8m0fnu, the scales of other formats, holds neither 0 nor a step down."""
    scales, tx = jnp.ones(2, jnp.float8_e8m0fnu), rmsprop(0.1)
    with pytest.raises(TypeError, match=r"parameter 'w' must be .*, got float8_e8m0fnu\[2\]"):
        tx.init({"w": scales})
    with pytest.raises(AssertionError, match=r"gradient float8_e8m0fnu\[2\], nu float32\[2\]"):
        tx.update({"w": scales}, tx.init({"w": jnp.ones(2)}))


STATE = {"layer": {"w": jnp.ones((1, 3)), "b": jnp.ones(2)}}
GRADIENTS = [
    ({"w": jnp.ones((3, 1))}, r"layer/w.*float32\[3, 1\].*float32\[1, 3\]"),
    ({"w": jnp.ones(())}, r"layer/w.*float32\[\].*float32\[1, 3\]"),
    ({"w": 1.0}, r"layer/w.*1.0 of type float.*float32\[1, 3\]"),
    ({"w": jnp.ones((1, 3), jnp.int32)}, r"layer/w.*int32\[1, 3\].*float32\[1, 3\]"),
    ({"w": np.zeros((1, 3), jax.dtypes.float0)}, r"layer/w.*float0.*float32\[1, 3\]"),
    ({"w": "gradient"}, r"layer/w.*'gradient' of type str.*float32\[1, 3\]"),
    (
        {"w": {"kernel": jnp.ones((1, 3))}},
        r"missing \['layer/w'\], unexpected \['layer/w/kernel'\]",
    ),
    ({"c": jnp.ones(2)}, r"missing \[\], unexpected \['layer/c'\]"),
    (
        {"c": {}},
        r"at 'layer' the gradients have a dict of \['b', 'c', 'w'\], nu has a dict of \['b",
    ),
    ({"w": [jnp.ones((1, 3))]}, r"missing \['layer/w'\], unexpected \['layer/w/0'\]"),
]


@pytest.mark.parametrize(("change", "message"), GRADIENTS, ids=[m for _, m in GRADIENTS])
@pytest.mark.parametrize("form", [{}, {"centered": True, "momentum": 0.9}], ids=str)
def test_gradients_must_fit_the_state(change, message, form):
    tx = rmsprop(0.1, **form)
    state = tx.init(STATE)
    grads = {"layer": STATE["layer"] | change}
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        tx.update(grads, state)
    if (
        not isinstance(grads["layer"]["w"], str)
        and getattr(grads["layer"]["w"], "dtype", None) != jax.dtypes.float0
    ):
        with pytest.raises(AssertionError, match=f"(?s){message.replace('1.0 of type float', '')}"):
            jax.jit(tx.update)(grads, state)


@pytest.mark.parametrize(
    ("grads", "params", "message"),
    [
        ((1.0, 2.0), [1.0, 2.0], r"at the root the gradients have a tuple.*nu has a list of \['0'"),
        (
            {"a": {"b": (1.0,)}},
            {"a": {"b": [1.0]}},
            r"at 'a/b' the gradients have a tuple of \['0'",
        ),
        ({"a": 1.0}, {"a": 1.0, "b": {}}, r"a dict of \['a'\], nu has a dict of \['a', 'b'\]"),
        (
            {"a": 1.0, "b": ()},
            {"a": 1.0, "b": []},
            r"at 'b' the gradients have a tuple of \[\], nu",
        ),
        ({"a": None}, {"a": ()}, r"missing \[\], unexpected \['a'\]"),
        (
            {"a": 1.0, "b": optax.EmptyState()},
            {"a": 1.0, "b": optax.MaskedNode()},
            "a EmptyState of",
        ),
        (optax.TraceState(1.0), {"trace": 1.0}, "have a TraceState of .'trace'., nu has a dict"),
    ],
)
def test_errors_of_structure_name_the_place_and_both_kinds(grads, params, message):
    for tx, name in ((rmsprop(0.1), "nu"), (rmsprop(0.1, weight_decay=0.1), "params")):
        state = tx.init(params if name == "nu" else grads)
        with pytest.raises(AssertionError, match=f"(?s){message.replace('nu', name)}"):
            tx.update(grads, state, params)


def test_structures_that_differ_in_what_is_not_seen_are_told_apart():
    class Node(NamedTuple):
        w: float

    ours, Node = Node, NamedTuple("Node", [("w", float)])
    tx = rmsprop(0.1)
    with pytest.raises(AssertionError, match=r"a Node of .*, nu has a Node of .* of another class"):
        tx.update(Node(1.0), tx.init(ours(1.0)))


def test_complex_gradients_are_refused_where_only_real_parameters_have_such_states():
    x = jnp.ones((8, 512))
    for storage in (low_memory.bfloat16(), low_memory.q8()):
        tx = rmsprop(0.1, storage=storage)
        with pytest.raises(AssertionError, match=r"gradient complex64\[8, 512\], nu"):
            tx.update(x.astype(jnp.complex64), tx.init(x))


def test_a_gradient_must_have_a_state():
    """Where a parameter is None, or an integer, there is nothing that it could train."""
    tx = rmsprop(0.1)
    for leaf in (None, 3, jnp.arange(2), jnp.ones(2, bool), jax.random.key(0)):
        state = tx.init({"a": jnp.ones(2), "b": leaf})
        with pytest.raises(
            AssertionError, match=r"(?s)tree 0.*'b': \*.*tree 1.*'b': None.*\['b'\] must be None"
        ):
            tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state)


def test_plain_gradients_must_be_complex_where_the_parameters_are():
    """What is remembered of both is real: the parameters tell, where they are given."""
    real, complex_ = {"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.complex64)}
    tx = rmsprop(0.1)
    for grads, params in ((real, complex_), (complex_, real)):
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(AssertionError, match=r"'w': gradient \w+\[2\], params \w+\[2\]"):
                update(grads, tx.init(params), params)
    tx.update(real, tx.init(real), {"other": 1j})  # of which nothing is needed


def test_gradients_must_be_complex_where_the_parameters_are():
    real, complex_ = jnp.ones(2), jnp.ones(2, jnp.complex64)
    tx = rmsprop(0.1, momentum=0.9)
    for params, grads in ((real, complex_), (complex_, real)):
        with pytest.raises(AssertionError, match=f"gradient {grads.dtype}.*trace {params.dtype}"):
            tx.update(grads, tx.init(params))
    tx = rmsprop(0.1, weight_decay=0.1)
    with pytest.raises(AssertionError, match=r"gradient complex64\[2\], params float32\[2\]"):
        tx.update(complex_, tx.init(real), real)


def test_weight_decay_needs_parameters_that_fit():
    for decoupled in (False, True):
        tx = rmsprop(0.1, weight_decay=0.1, decoupled_weight_decay=decoupled)
        state = tx.init(STATE)
        with pytest.raises(ValueError, match=r"weight_decay needs the parameters: call update\("):
            tx.update(STATE, state)
        with pytest.raises(AssertionError, match=r"params"):
            tx.update(STATE, state, {"layer": {"w": jnp.ones((1, 3))}})
        with pytest.raises(AssertionError, match=r"layer/b.*float32\[2\], params float32\[1\]"):
            tx.update(STATE, state, {"layer": {"w": jnp.ones((1, 3)), "b": jnp.ones(1)}})


def test_states_of_other_transformations():
    g = jnp.ones(2)
    with pytest.raises(TypeError, match="state must be of type RMSPropState, got tuple"):
        rmsprop(0.1).update(g, optax.rmsprop(0.1).init(g))
    for other, field in (
        ({"centered": True}, "mu must be None"),
        ({"momentum": 0.9}, "trace must be None"),
        ({"bias_correction": True}, "weight_sum must be None"),
    ):
        with pytest.raises(ValueError, match=f"state.{field}"):
            rmsprop(0.1).update(g, rmsprop(0.1, **other).init(g))
        with pytest.raises(ValueError, match=f"state.{field.replace('must', 'must not')}"):
            rmsprop(0.1, **other).update(g, rmsprop(0.1).init(g))


def test_nothing_is_refused_when_chex_is_told_so():
    """chex.disable_asserts is the user's choice; a misfit then shows up in JAX itself."""
    import chex

    tx = rmsprop(0.1)
    state = tx.init(jnp.ones((2, 3)))
    chex.disable_asserts()
    try:
        with pytest.raises(TypeError):
            tx.update(jnp.ones((4, 5)), state)
    finally:
        chex.enable_asserts()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "complex64"])
def test_a_state_cast_to_another_dtype_is_refused(dtype):
    """As by a cast of a whole train state: the arithmetic would follow the state's dtype."""
    tx = rmsprop(0.1)
    state = tx.init({"w": jnp.ones(2)})
    cast = state._replace(nu={"w": state.nu["w"].astype(dtype)})
    with pytest.raises(AssertionError, match=rf"w.*gradient float32\[2\], nu {dtype}\[2\]"):
        tx.update({"w": jnp.ones(2)}, cast)
