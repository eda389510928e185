"""Conversion of states: identities, the learning rate in buffers, wrappers, placement.

Comparisons with PyTorch, Keras and TensorFlow themselves are in test_continuation.py.
"""

import copy

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from conversions import (
    FORMS,
    FRAMEWORKS,
    MAPPING,
    NAMES,
    Framework,
    assert_one_rounding,
    assert_same,
    begun,
    going_on,
    group,
    tree,
)
from rmsprop_jax import convert, dialects, rmsprop
from rmsprop_jax._rule import is_ours


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(framework, dtype):
    """Bit for bit, but for the variance: one rounding to the precision of the second moment."""
    with jax.enable_x64(dtype == np.float64):
        params, state = begun(framework.tx, tree(dtype=dtype))
        again = framework.back(framework.to(state, params), params)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert_same(again._replace(nu=None), state._replace(nu=None))
    if state.mu is None:
        assert_same(again.nu, state.nu)
    else:
        jax.tree.map(
            lambda a, b, m: assert_one_rounding(a, b, b + m**2), again.nu, state.nu, state.mu
        )


def test_a_second_moment_below_the_square_of_the_mean_is_a_variance_of_0():
    """As frameworks reach it by cancellation."""
    slots = {"rms": {"w": [1.0, 4.0]}, "mg": {"w": [1.5, 1.5]}, "momentum": {"w": [0.0, 0.0]}}
    tx, params = dialects.tensorflow_v1(0.1, centered=True), {"w": jnp.zeros(2)}
    state = convert.from_tensorflow_v1(slots, params, {"w": "w"}, tx)
    np.testing.assert_array_equal(state.nu["w"], [0, 1.75])
    back = convert.to_tensorflow_v1(state, params, {"w": "w"}, tx)
    np.testing.assert_array_equal(back["rms"]["w"], [2.25, 4])


# The learning rate in the buffer and after it.


def pair(rate, momentum=0.9):
    """One rule twice: the learning rate after the buffer, as PyTorch has it, and in it."""
    options = {"decay": 0.99, "eps_in_sqrt": False, "momentum": momentum}
    return (
        dialects.pytorch(rate, momentum=momentum),
        rmsprop(rate, lr_in_momentum=True, **options),
    )


def exchange(state, params, tx, other):
    """The state of one as the state of the other, by way of PyTorch's."""
    groups = [group(momentum=0.9)]
    given = convert.to_pytorch(state, params, MAPPING, tx, param_groups=groups, names=NAMES)
    return convert.from_pytorch(given, params, MAPPING, other, names=NAMES)


OTHER = {"after": "in", "in": "after"}


def both(rate):
    """Two transformations, a program of both, and the runs {name: (params, state)} of 5 steps."""
    made = dict(zip(OTHER, pair(rate), strict=True))
    go_on, params = going_on(made), tree(dtype=np.float64)
    begin = {name: (params, tx.init(params)) for name, tx in made.items()}
    return made, go_on, go_on(begin, grads(5))


def grads(steps, seed=1):
    return [tree(seed + t, np.float64) for t in range(steps)]


def swapped(made, runs):
    """Each goes on where the other is."""
    return {
        name: (runs[other][0], exchange(runs[other][1], runs[other][0], made[other], made[name]))
        for name, other in OTHER.items()
    }


def test_goes_on_exactly_at_a_constant_learning_rate(subtests):
    with jax.enable_x64(True):
        made, go_on, runs = both(0.3)
        want, got = go_on(runs, grads(5, 6)), go_on(swapped(made, runs), grads(5, 6))
    for name, other in OTHER.items():
        with subtests.test(buffer=name):
            assert np.all(want[other][0]["flat"] != runs[other][0]["flat"])
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-12),
                got[name][0],
                want[other][0],
            )


def test_takes_the_next_step_exactly_under_a_schedule(subtests):
    """And no more: after it the two rules are two."""
    with jax.enable_x64(True):
        made, go_on, runs = both(lambda count: 0.3 * 0.5**count)
        given = swapped(made, runs)
        for steps in (1, 2):
            ends = go_on(given, grads(steps, 6)), go_on(runs, grads(steps, 6)), runs
            got, want, start = jax.device_get(ends)
            for name, other in OTHER.items():
                leaves = (
                    jax.tree.leaves(x) for x in (got[name][0], want[other][0], start[other][0])
                )
                apart = max(
                    np.max(np.abs(a - b) / np.abs(b - x)) for a, b, x in zip(*leaves, strict=True)
                )
                with subtests.test(buffer=name, steps=steps):
                    assert apart < 1e-12 if steps == 1 else apart > 0.1


def test_a_rescaled_buffer_comes_back_within_one_rounding():
    tx, other = pair(0.3)
    params, state = begun(tx, tree())
    again = exchange(exchange(state, params, tx, other), params, other, tx)
    assert_same(again._replace(trace=None), state._replace(trace=None))
    jax.tree.map(lambda a, b: assert_one_rounding(a, b, b), again.trace, state.trace)


def test_no_buffer_has_a_learning_rate_of_0():
    rate = optax.piecewise_constant_schedule(0.1, {7: 0.0})
    tx, other = pair(rate)
    params, state = begun(tx, tree())
    for one, two in ((tx, other), (other, tx)):
        with pytest.raises(ValueError, match="the learning rate after 7 steps is 0"):
            exchange(state, params, one, two)
    before = state._replace(count=jnp.asarray(6, jnp.int32))
    found = exchange(before, params, tx, other)
    np.testing.assert_allclose(found.trace["flat"], 0.1 * before.trace["flat"], 1e-6)


def test_a_buffer_cannot_be_rescaled_by_several_learning_rates():
    outside, inside = pair(0.1)
    labels = jax.tree.map(lambda _: "a", tree())
    labels["flat"] = "b"
    for parts in ({"a": inside, "b": pair(0.2)[1]}, {"a": inside, "b": outside}):
        tx = optax.partition(parts, labels)
        params, state = begun(outside, tree())
        with pytest.raises(ValueError, match="several learning rates"):
            exchange(state, params, outside, tx)
        alike = optax.partition({"a": inside, "b": inside}, labels)
        again = exchange(exchange(state, params, outside, alike), params, alike, outside)
        assert_same(again.nu, state.nu)
        jax.tree.map(lambda a, b: assert_one_rounding(a, b, b), again.trace, state.trace)


# Complex parameters of PyTorch are pairs.


@pytest.mark.parametrize("form", FORMS)
def test_complex_numbers_of_pytorch(form):
    framework = Framework("pytorch", **form)
    params, state = begun(framework.tx, tree(dtype=np.complex64))
    again = framework.back(framework.to(state, params), params)
    assert_same(again._replace(nu=None), state._replace(nu=None))
    for part in (np.real, np.imag):
        for b, a, m in zip(
            *map(jax.tree.leaves, (state.nu, again.nu, state.mu or state.nu)), strict=True
        ):
            size = part(b) + (part(m) ** 2 if form.get("centered") else 0)
            assert_one_rounding(part(a), part(b), size)


# What a transformation may be wrapped in, and where parameters may be.

WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("rmsprop", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": tx}, {"fc": "a", "cell": {"i": "a", "o": "b"}, "flat": "b"}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if "centered" in f.id])
def test_wrapped(framework, wrapper):
    """Every RMSPropState is filled, all else is as init makes it; and back from it."""
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    tx = WRAPPERS[wrapper](framework.tx)
    wrapped = framework.back(given, params, tx)
    filled = [x for x in jax.tree.leaves(wrapped, is_leaf=is_ours) if is_ours(x)]
    assert [int(one.count) for one in filled] == [7] * (2 if wrapper == "partition" else 1)
    inner = copy.copy(framework)
    inner.tx = tx
    again = inner.to(wrapped, params)
    state = framework.back(given, params)
    jax.tree.map(np.testing.assert_array_equal, again, framework.to(state, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), again, given)


def test_a_state_is_placed_like_its_parameters():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("x"))
    params = tree()
    framework = Framework("pytorch", momentum=0.9, centered=True)
    given = framework.to(begun(framework.tx, params)[1], params)
    assert all(np.all(slot) for slots in given["state"].values() for slot in slots.values())
    params["flat"] = jax.device_put(params["flat"], split)
    state = framework.back(given, params)
    for slot in (state.nu, state.mu, state.trace):
        assert slot["flat"].sharding == split
        assert slot["fc"]["bias"].sharding == params["fc"]["bias"].sharding
    again = convert.params_from(convert.params_to(params, MAPPING), params, MAPPING)
    assert_same(again, params)
    given_again = framework.to(state, params)
    jax.tree.map(np.testing.assert_array_equal, given_again, given)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(3, 2, rngs=rngs)
        self.value = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        return self.value(self.fc(x))


def test_nnx():
    """A converted state in nnx.Optimizer, by names that do not show how NNX wraps arrays."""
    model = Model(nnx.Rngs(0))
    tx = dialects.tensorflow_v1(0.1, momentum=0.9)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    mapping = convert.torch_dense("fc", "fc") | convert.torch_dense("value", "out")
    slots = {
        slot: {n: seed + a for n, a in convert.params_to(params, mapping).items()}
        for seed, slot in enumerate(("rms", "momentum"), 5)
    }
    state = convert.from_tensorflow_v1(slots, params, mapping, tx, steps=7)
    nnx.update(optimizer, nnx.state({"opt_state": state}))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((4, 3))) ** 2))(model)
        optimizer.update(model, grads)

    back = convert.to_tensorflow_v1(optimizer.opt_state, params, mapping, optimizer.tx)
    jax.tree.map(np.testing.assert_array_equal, back, slots)
    pure = nnx.to_pure_dict(params)
    assert_same(
        convert.from_tensorflow_v1(slots, pure, mapping, tx, steps=7).nu, nnx.to_pure_dict(state.nu)
    )
    step(model, optimizer)
    assert int(optimizer.opt_state.count.get_value()) == 8


def test_a_parameter_called_value():
    params = {"a": {"value": jnp.zeros(2)}, "b": {"value": jnp.zeros(3)}}
    found = convert.params_to(params, {"a/value": "x", "b/value": "y"})
    assert {name: a.shape for name, a in found.items()} == {"x": (2,), "y": (3,)}
