"""Conversion of states and parameters: mappings, identities, other forms, wrappers, bad input.

What PyTorch, Keras and TensorFlow themselves say of it is in test_continuation.py.
"""

import copy
import functools

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

import helpers
from rmsprop_jax import RMSPropState, convert, dialects, rmsprop
from rmsprop_jax.convert import Leaf
from rmsprop_jax.convert._mapping import put, resolve, take

# A tree with a leaf of every kind of layout, and the names of the framework in its order.
SHAPES = {
    "fc": {"kernel": (3, 2), "bias": (2,)},
    "cell": {"i": (2, 3), "o": (2, 3)},
    "flat": (12, 5),
}
MAPPING = {
    "fc/kernel": Leaf("fc.weight", (1, 0)),
    "fc/bias": "fc.bias",
    "cell/i": Leaf("cell.weight", (1, 0), part=(0, 2, 0)),
    "cell/o": Leaf("cell.weight", (1, 0), part=(1, 2, 0)),
    "flat": Leaf("flat.weight", (2, 3, 1, 0), (-1, 3, 2, 2)),
}
NAMES = ["cell.weight", "flat.weight", "fc.weight", "fc.bias"]


def tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def after(tx, steps, params, state=None, first=0):
    """The parameters and the state after some steps."""
    state = tx.init(params) if state is None else state
    for t in range(first, first + steps):
        updates, state = tx.update(tree(t + 1, jax.tree.leaves(params)[0].dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def group(numbers=(0, 1, 2, 3), **options):
    """One of torch.optim.RMSprop's param_groups."""
    defaults = {
        "lr": 0.01,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
        "centered": False,
        "maximize": False,
        "capturable": False,
        "foreach": None,
        "differentiable": False,
    }
    return defaults | options | {"params": list(numbers)}


def timm_group(numbers=(0, 1, 2, 3), **options):
    """One of timm's RMSpropTF's param_groups."""
    defaults = {
        "lr": 0.01,
        "momentum": 0.0,
        "alpha": 0.9,
        "eps": 1e-10,
        "centered": False,
        "weight_decay": 0,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
        "max_lr_snapshot": None,
        "lr_in_momentum": True,
        "caution": False,
        "foreach": None,
    }
    return defaults | options | {"params": list(numbers)}


class Framework:
    """Both directions of one framework, with arguments that fit the tree above."""

    def __init__(self, name, **options):
        self.name = name
        self.options = options
        build = {"tensorflow": "tensorflow_v1"}.get(name, name)
        if name == "optax":
            self.tx = rmsprop(0.01, **options)
            self.theirs = optax.rmsprop(0.01, **options)
        else:
            self.tx = getattr(dialects, build)(
                **{"pytorch": {}, "timm": {}}.get(name, {"learning_rate": 0.01}), **options
            )

    def to(self, state, params):
        if self.name == "keras":
            return convert.to_keras(
                state, params, MAPPING, self.tx, learning_rate=0.01, names=NAMES
            )
        if self.name == "tensorflow":
            return convert.to_tensorflow_v1(state, params, MAPPING, self.tx)
        if self.name == "optax":
            return convert.to_optax(state, params, self.tx, self.theirs.init(params))
        make = {"pytorch": (convert.to_pytorch, group), "timm": (convert.to_timm, timm_group)}
        to, one = make[self.name]
        groups = [one(**self.options)]
        return to(state, params, MAPPING, self.tx, param_groups=groups, names=NAMES)

    def back(self, given, params, tx=None, mapping=MAPPING, **rest):
        tx = tx or self.tx
        if self.name == "tensorflow":
            return convert.from_tensorflow_v1(given, params, mapping, tx, steps=7, **rest)
        if self.name == "optax":
            return convert.from_optax(given, params, tx, steps=7)
        rest = {"names": NAMES} | rest
        return getattr(convert, f"from_{self.name}")(given, params, mapping, tx, **rest)


FORMS = [
    {},
    {"momentum": 0.9},
    {"centered": True},
    {"momentum": 0.9, "centered": True},
]
FRAMEWORKS = [
    pytest.param(Framework(name, **form), id="-".join([name, *form]))
    for name in ("pytorch", "timm", "keras", "tensorflow", "optax")
    for form in FORMS
]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(framework, dtype):
    """Bit for bit, but for the variance: one rounding to the precision of the second moment."""
    with jax.enable_x64(dtype == np.float64):
        params, state = after(framework.tx, 7, tree(dtype=dtype))
        again = framework.back(framework.to(state, params), params)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert_same(again._replace(nu=None), state._replace(nu=None))
    if state.mu is None:
        assert_same(again.nu, state.nu)
    else:
        jax.tree.map(
            lambda a, b, m: assert_one_rounding(a, b, b + m**2), again.nu, state.nu, state.mu
        )


def assert_same(got, want):
    """Bit for bit, of the same dtypes, in the same places."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def assert_one_rounding(got, want, size):
    """To the precision of a number of that size."""
    assert np.all(np.abs(got - want) <= np.spacing(np.abs(size)))


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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["into the buffer", "out of it"])
def test_goes_on_exactly_at_a_constant_learning_rate(order):
    with jax.enable_x64(True):
        tx, other = (pair(0.3)[i] for i in order)
        params, state = after(tx, 5, tree(dtype=np.float64))
        want, _ = after(tx, 5, params, state, first=5)
        got, _ = after(other, 5, params, exchange(state, params, tx, other), first=5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-12), got, want)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["into the buffer", "out of it"])
def test_takes_the_next_step_exactly_under_a_schedule(order):
    """And no more: after it the two rules are two."""
    with jax.enable_x64(True):
        tx, other = (pair(lambda count: 0.3 * 0.5**count)[i] for i in order)
        params, state = after(tx, 5, tree(dtype=np.float64))
        given = exchange(state, params, tx, other)
        for steps, near in ((1, 1e-12), (2, None)):
            want, _ = after(tx, steps, params, state, first=5)
            got, _ = after(other, steps, params, given, first=5)
            apart = max(
                float(jnp.max(jnp.abs(a - b) / jnp.abs(b - x)))
                for a, b, x in zip(*map(jax.tree.leaves, (got, want, params)), strict=True)
            )
            assert apart < near if near else apart > 0.1


def test_a_rescaled_buffer_comes_back_within_one_rounding():
    tx, other = pair(0.3)
    params, state = after(tx, 5, tree())
    again = exchange(exchange(state, params, tx, other), params, other, tx)
    assert_same(again._replace(trace=None), state._replace(trace=None))
    jax.tree.map(lambda a, b: assert_one_rounding(a, b, b), again.trace, state.trace)


def test_no_buffer_has_a_learning_rate_of_0():
    rate = optax.piecewise_constant_schedule(0.1, {5: 0.0})
    tx, other = pair(rate)
    params, state = after(tx, 5, tree())
    for one, two in ((tx, other), (other, tx)):
        with pytest.raises(ValueError, match="the learning rate after 5 steps is 0"):
            exchange(state, params, one, two)
    params, state = after(tx, 4, tree())
    exchange(state, params, tx, other)


def test_a_buffer_cannot_be_rescaled_by_several_learning_rates():
    outside, inside = pair(0.1)
    labels = jax.tree.map(lambda _: "a", tree())
    labels["flat"] = "b"
    for parts in ({"a": inside, "b": pair(0.2)[1]}, {"a": inside, "b": outside}):
        tx = optax.partition(parts, labels)
        params, state = after(outside, 3, tree())
        with pytest.raises(ValueError, match="several learning rates"):
            exchange(state, params, outside, tx)
        exchange(state, params, outside, optax.partition({"a": inside, "b": inside}, labels))


# Optax.

OPTAX = {
    "plain": {},
    "eps outside": {"eps_in_sqrt": False},
    "from 1": {"initial_scale": 1.0},
    "centered": {"centered": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "bias correction": {"bias_correction": True},
    "schedule": {"learning_rate": optax.exponential_decay(0.01, 1, 0.9)},
    "schedule, momentum": {"learning_rate": optax.exponential_decay(0.01, 1, 0.9), "momentum": 0.9},
    "most": {"centered": True, "bias_correction": True, "momentum": 0.9, "nesterov": True},
    "all": {
        "learning_rate": optax.exponential_decay(0.01, 1, 0.9),
        "centered": True,
        "bias_correction": True,
        "momentum": 0.9,
    },
}


def both(form):
    # What is centered cancels in Optax, most of all in its first steps: a large eps hides that.
    eps = 0.1 if OPTAX[form].get("centered") else 1e-4
    options = {"learning_rate": 0.01, "eps": eps} | OPTAX[form]
    return optax.rmsprop(**options), rmsprop(**options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("form", OPTAX)
def test_optax_goes_on_and_is_gone_on_with(form, dtype):
    """k steps there and k here are 2 k there, and the other way round; and so is the state."""
    k, x = 7, np.linspace(-1, 1, 40).astype(dtype)
    grads = helpers.gradients(2 * k, dtype=dtype, low=-2, high=0)
    wide = np.finfo(dtype).bits == 64
    with jax.enable_x64(wide):
        theirs, ours = both(form)
        params = {"layer": {"w": jnp.asarray(x)}}

        def steps(tx, params, state, some):
            for g in some:
                updates, state = tx.update({"layer": {"w": jnp.asarray(g)}}, state, params)
                params = optax.apply_updates(params, updates)
            return params, state

        middle, there = steps(theirs, params, theirs.init(params), grads[:k])
        want, _ = steps(theirs, middle, there, grads[k:])
        state = convert.from_optax(there, params, ours, steps=k)
        assert int(state.count) == k
        check = functools.partial(
            helpers.assert_close, rtol=1e-11 if wide else 5e-5, atol=1e-13 if wide else 5e-7
        )
        got, _ = steps(ours, middle, state, grads[k:])
        check([np.asarray(got["layer"]["w"])], [np.asarray(want["layer"]["w"])])

        # and back
        ours_middle, here = steps(ours, params, ours.init(params), grads[:k])
        given = convert.to_optax(here, params, ours, theirs.init(params))
        got, _ = steps(theirs, ours_middle, given, grads[k:])
        check([np.asarray(got["layer"]["w"])], [np.asarray(want["layer"]["w"])])

        again = convert.to_optax(state, params, ours, there)
        assert jax.tree.structure(again) == jax.tree.structure(there)
        rounded = OPTAX[form].get("centered") or OPTAX[form].get("bias_correction")
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(there), strict=True):
            assert a.dtype == b.dtype
            if rounded:  # s and v, and the division by 1 - decay^k: of each a rounding
                assert np.all(np.abs(a - b) <= 2 * np.spacing(np.abs(b)))
            else:
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", ["plain", "momentum", "all"])
def test_optax_in_bfloat16(form):
    """Its state has the dtype of the parameters; ours is as good as exact, and comes back."""
    theirs, ours = both(form)
    params, there = after(theirs, 7, tree(dtype=jnp.bfloat16))
    state = convert.from_optax(there, params, ours, steps=7)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((state.nu, state.mu, state.trace)))
    again = convert.to_optax(state, params, ours, theirs.init(params))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(there), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_optax_says_how_many_steps_it_took_if_it_knows():
    for form, knows in {"plain": False, "bias correction": True, "schedule": True}.items():
        theirs, ours = both(form)
        params, there = after(theirs, 7, tree())
        assert int(convert.from_optax(there, params, ours).count) == 7 * knows
    assert int(convert.from_optax(there, params, ours, steps=3).count) == 3


def test_optax_may_be_wrapped():
    theirs, ours = both("all")
    params, there = after(theirs, 7, tree())
    steps = optax.MultiSteps(theirs, 2).init(params)._replace(inner_opt_state=there)
    wrapped = (optax.EmptyState(), steps)
    assert_same(convert.from_optax(wrapped, params, ours), convert.from_optax(there, params, ours))


def test_a_decay_in_an_array_counts():
    """As an argument of a jitted step, it is an array."""
    theirs, ours = both("bias correction")
    params, there = after(theirs, 7, tree())
    want = convert.from_optax(there, params, ours)
    tx = rmsprop(0.01, jnp.asarray(0.9), bias_correction=True)
    for a, b in zip(
        *map(jax.tree.leaves, (convert.from_optax(there, params, tx), want)), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-6)


# Complex parameters of PyTorch are pairs.


@pytest.mark.parametrize("form", FORMS)
def test_complex_numbers_of_pytorch(form):
    framework = Framework("pytorch", **form)
    params, state = after(framework.tx, 7, tree(dtype=np.complex64))
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
    params, state = after(framework.tx, 7, tree())
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


def is_ours(value):
    return isinstance(value, RMSPropState)


def test_a_state_is_placed_like_its_parameters():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("x"))
    params = tree()
    framework = Framework("pytorch", momentum=0.9, centered=True)
    given = framework.to(after(framework.tx, 3, params)[1], params)
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


# Mappings.


@st.composite
def layouts(draw):
    """Arrays of another framework, and a mapping of leaves to them with the leaves' shapes."""
    arrays, mapping, shapes = {}, {}, {}
    for index in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([f"array {index}", index]))
        kind = draw(st.sampled_from(["whole", "parts", "image"]))
        shape = draw(st.lists(st.integers(1, 3), min_size=0 if kind == "whole" else 1, max_size=4))
        axes = tuple(draw(st.permutations(range(len(shape)))))
        if kind == "image":
            rows, *rest = [*shape, 2]
            order = tuple(draw(st.permutations(range(len(rest) + 1))))
            whole = (rows, int(np.prod(rest)))
            folded = (draw(st.sampled_from([-1, rows])), *rest)
            mapping[f"{index}"] = Leaf(name, order, folded)
            shapes[f"{index}"] = draw(
                st.sampled_from([(rows * whole[1],), tuple(np.take([rows, *rest], order))])
            )
        elif kind == "parts":
            count, axis = draw(st.integers(1, 3)), draw(st.integers(0, len(shape) - 1))
            whole = tuple(n * count if i == axis else n for i, n in enumerate(shape))
            for i in range(count):
                mapping[f"{index}/{i}"] = Leaf(name, axes, part=(i, count, axis))
                shapes[f"{index}/{i}"] = tuple(np.take(shape, axes))
        else:
            whole = tuple(shape)
            mapping[f"{index}"] = draw(st.sampled_from([Leaf(name, axes), Leaf(name)]))
            shapes[f"{index}"] = tuple(
                np.take(shape, mapping[f"{index}"].axes or range(len(shape)))
            )
            shapes[f"{index}"] = tuple(int(n) for n in shapes[f"{index}"])
        arrays[name] = np.arange(np.prod(whole)).reshape(whole)
    return arrays, mapping, shapes


@settings(deadline=None, max_examples=200)
@given(layouts())
def test_put_undoes_take(layout):
    arrays, mapping, shapes = layout
    leaves = resolve(mapping, {path: np.zeros(shape) for path, shape in shapes.items()})
    values = {
        path: take(arrays[leaf.name], leaf, shapes[path], "it") for path, leaf in leaves.items()
    }
    assert sum(value.size for value in values.values()) == sum(a.size for a in arrays.values())
    again = put(values, leaves)
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


def test_arrays_that_are_added_there_are_summed_and_shared_out():
    mapping = {"bias": Leaf("b", also=("c",))}
    params = {"bias": jnp.zeros(3)}
    found = convert.params_from({"b": [1.0, 2, 3], "c": [10.0, 20, 30]}, params, mapping)
    np.testing.assert_array_equal(found["bias"], [11, 22, 33])
    back = convert.params_to(found, mapping)
    assert set(back) == {"b", "c"}
    np.testing.assert_array_equal(back["b"], [5.5, 11, 16.5])
    np.testing.assert_array_equal(back["c"], back["b"])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_parameters_come_in_the_dtype_of_ours(dtype):
    found = convert.params_from({"w": np.float64([1 / 3])}, {"w": jnp.zeros(1, dtype)}, {"w": "w"})
    assert found["w"].dtype == dtype
    assert found["w"] == jnp.asarray(1 / 3, dtype)


def test_a_tree_may_be_one_leaf():
    tx, x = dialects.keras(0.1, momentum=0.9), jnp.ones(3)
    _, state = tx.update(x, tx.init(x))
    given = convert.to_keras(state, x, {"": 0}, tx, learning_rate=0.1)
    assert [a.shape for a in given] == [(), (), (3,), (3,)]
    assert_same(convert.from_keras(given, x, {"": 0}, tx), state)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, r"every parameter: \['a', 'b'\] are missing"),
        ({"a": "x"}, r"every parameter: \['b'\] are missing"),
        ({"a": "x", "b": "y", "c": "z"}, r"names \['c'\], of which params has only \['a', 'b'\]"),
        ({"a": "x", "b": "x"}, "use 'x' once, or each of its parts"),
        ({"a": "x", "b": Leaf("y", also=("x",))}, "use 'x' once"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": "y"}, "use 'x' once, or each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(0, 2, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(2, 2, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(1, 3, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(1, 2, 1))}, "each of its parts"),
        ({"a": "x", "b": "z"}, r"mapping names \['z'\], of which there are only \['x', 'y'\]"),
        ({"a": "x", "b": Leaf("y", (1, 0))}, r"'y' has shape \(4,\).*does not become \(4,\)"),
        ({"a": "x", "b": Leaf("y", (0,), (-1,))}, r"'y' has shape \(4,\)"),
        ({"a": "x", "b": Leaf("y", None, (3, -1))}, r"'y' has shape \(4,\)"),
    ],
)
def test_refuses_mappings(mapping, message):
    params = {"a": np.zeros(4), "b": np.zeros(4)}
    with pytest.raises(ValueError, match=message):
        convert.params_from({"x": np.ones(4), "y": np.ones(4)}, params, mapping)


def test_refuses_parts_that_do_not_divide_their_array():
    params, mapping = {"a": np.zeros(2), "b": np.zeros(2)}, {}
    for axis, shape in ((1, (4,)), (-2, (4,)), (0, (5,)), (0, ())):
        mapping = {path: Leaf("x", part=(i, 2, axis)) for i, path in enumerate("ab")}
        with pytest.raises(ValueError, match=rf"'x' has shape .*, not 2 parts on axis {axis}"):
            convert.params_from({"x": np.ones(shape)}, params, mapping)


def test_refuses_what_is_not_a_mapping_of_names():
    for value in (None, 1.5, ("x", (1, 0)), True):
        with pytest.raises(TypeError, match="a Leaf, a name or a number a path, got"):
            convert.params_from({"x": np.ones(4)}, {"a": np.zeros(4)}, {"a": value})


def test_refuses_arrays_that_nothing_is_made_of():
    arrays = {"x": np.ones(4), "y": np.ones(4), "steps": np.ones(())}
    with pytest.raises(ValueError, match=r"mapping names nothing of \['steps'\]"):
        convert.params_from(arrays, {"a": np.zeros(4), "b": np.zeros(4)}, {"a": "x", "b": "y"})


def test_refuses_parameters_that_do_not_fit_their_mapping():
    for leaf in (Leaf("x", (1, 0)), Leaf("x", (0, 1), (3, 2)), Leaf("x", (2, 1, 0), (-1, 2))):
        with pytest.raises(ValueError, match=r"'a' has shape \(4,\)"):
            convert.params_to({"a": np.zeros(4)}, {"a": leaf})


def test_refuses_cells_that_flax_has_not():
    for lstm in (convert.torch_lstm, convert.keras_lstm):
        with pytest.raises(ValueError, match=r"cell must be one of .*'linen', 'nnx'.*, got 'gru'"):
            lstm("cell", "lstm", "gru")


def test_ready_made_mappings_can_go_without_a_bias():
    for layer in (convert.torch_dense, convert.torch_conv, convert.keras_dense, convert.keras_conv):
        assert set(layer("a", "b")) == {"a/kernel", "a/bias"}
        assert set(layer("a", "b", bias=False)) == {"a/kernel"}
    assert set(convert.torch_dense_after_conv("a", "b", (1, 2, 3), bias=False)) == {"a/kernel"}


# Bad input: an error that names the entry, and nothing is changed.


def without(*keys):
    """Takes something out of what a framework gives."""

    def change(given):
        for key in keys[:-1]:
            given = given[key]
        del given[keys[-1]]

    return change


def replaced(*keys_and_value):
    """Puts something into what a framework gives."""

    def change(given):
        *keys, last, value = keys_and_value
        for key in keys:
            given = given[key]
        given[last] = value

    return change


MOMENTUM = {"momentum": 0.9}
WRONG = np.ones((7, 7), np.float32)
BAD_CHECKPOINTS = [
    ("pytorch", without("state"), "state_dict has no 'state'"),
    ("pytorch", without("param_groups"), "state_dict has no 'param_groups'"),
    ("pytorch", without("state", 1, "square_avg"), r"state\[1\] has \['momentum_buffer', 'step'\]"),
    ("pytorch", without("state", 1, "momentum_buffer"), r"state\[1\] has \['square_avg', 'step'\]"),
    ("pytorch", without("state", 1, "step"), r"state\[1\] has"),
    ("pytorch", replaced("state", 1, "grad_avg", WRONG), r"state\[1\] has \['grad_avg'"),
    ("pytorch", replaced("state", 4, {}), r"a state for \[4\], which no group has"),
    (
        "pytorch",
        replaced("state", 0, "square_avg", WRONG),
        r"nu of 'cell.weight' has shape \(7, 7\)",
    ),
    ("pytorch", replaced("state", 3, "momentum_buffer", WRONG), r"trace of 'fc.bias' has shape"),
    ("pytorch", without("param_groups", 0, "alpha"), "group has no 'alpha': it is of another"),
    ("pytorch", replaced("param_groups", 0, timm_group()), "it is of timm's RMSpropTF"),
    ("pytorch", replaced("param_groups", 0, "params", [0, 1, 2]), "names must be those of 3"),
    ("pytorch", replaced("param_groups", 0, "maximize", True), r"\[0\] has {'maximize': True}"),
    ("pytorch", replaced("param_groups", 0, "weight_decay", 0.1), "{'weight_decay': True}"),
    ("pytorch", replaced("param_groups", 0, "centered", True), "{'centered': True}"),
    ("pytorch", replaced("param_groups", 0, "momentum", 0.0), "{'momentum': False}"),
    ("pytorch", replaced("param_groups", 0, "param_names", NAMES[::-1]), "names must be those of"),
    ("timm", replaced("param_groups", 0, group()), "it is not of timm's RMSpropTF"),
    ("timm", replaced("param_groups", 0, "decoupled_decay", None), "decoupled_decay must be"),
    ("timm", replaced("param_groups", 0, "caution", True), "{'cautious': True}"),
    ("timm", replaced("param_groups", 0, "weight_decay", 0.1), "{'weight_decay': True}"),
    ("timm", without("state", 2, "step"), r"state\[2\] has"),
    ("keras", without(-1), r"nu of 'cell.weight' has shape \(\)"),  # the rate, as if scheduled
    (
        "keras",
        without(slice(-2, None)),
        r"4 each of \['velocity', 'momentum'\] as tx has them; got",
    ),
    ("keras", without(0), r"4 each of \['velocity', 'momentum'\]"),
    ("keras", lambda given: given.append(WRONG), r"4 each of \['velocity', 'momentum'\]"),
    ("keras", replaced(2, WRONG), "nu of 'cell.weight' has shape"),
    ("keras", replaced(9, WRONG), "trace of 'fc.bias' has shape"),
    ("keras", replaced(0, WRONG), r"got arrays of shapes \[\(7, 7\), \(\)"),
    ("tensorflow", replaced("velocity", {}), r"must be 'rms', 'momentum' .* got \['velocity'\]"),
    ("tensorflow", without("rms"), "slots must have 'rms'"),
    ("tensorflow", without("momentum"), "tx has momentum for .*, which the source has not"),
    (
        "tensorflow",
        without("rms", "fc.bias"),
        r"\['rms'\] and .*'momentum'\] differ in \['fc.bias'\]",
    ),
    ("tensorflow", without("momentum", "fc.bias"), r"differ in \['fc.bias'\]"),
    ("tensorflow", replaced("rms", "fc.bias", WRONG), "nu of 'fc.bias' has shape"),
    ("tensorflow", replaced("mg", {}), None),  # as good as none
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_CHECKPOINTS)
def test_refuses_checkpoints(name, change, message):
    framework = Framework(name, **MOMENTUM)
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    change(given)
    before = copy.deepcopy(given)
    if message is None:
        framework.back(given, params)
    else:
        with pytest.raises((ValueError, TypeError), match=message):
            framework.back(given, params)
    jax.tree.map(np.testing.assert_array_equal, given, before)
    assert jax.tree.structure(given) == jax.tree.structure(before)


@pytest.mark.parametrize("form", [{}, {"momentum": 0.9}, {"centered": True}])
@pytest.mark.parametrize("other", [{}, {"momentum": 0.9}, {"centered": True}])
@pytest.mark.parametrize("name", ["pytorch", "timm", "keras", "tensorflow", "optax"])
def test_refuses_another_form(name, form, other):
    """What tx has and the source has not, and the other way round."""
    framework, wanted = Framework(name, **form), Framework(name, **other)
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    if form == other or (name == "tensorflow" and {*form, *other} == {"momentum"}):
        wanted.back(given, params)  # TensorFlow keeps a momentum even where there is none
        return
    if name == "keras" and form and other:  # one more array, of the same shapes, in either
        return
    with pytest.raises(ValueError, match=r"momentum|centered|mu|trace"):
        wanted.back(given, params)
    with pytest.raises(ValueError, match=r"momentum|centered|mu|trace|state is not of tx"):
        wanted.to(state, params)
    like = copy.copy(framework)
    like.tx = wanted.tx
    with pytest.raises(ValueError, match=r"state is not of tx|param_groups"):
        like.to(state, params)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_refuses_other_transformations_and_states(framework):
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    for tx in (optax.rmsprop(0.1), optax.inject_hyperparams(rmsprop)(0.1), None):
        with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax"):
            framework.back(given, params, tx if tx else optax.adam(0.1))
        other = copy.copy(framework)
        other.tx = tx
        with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax"):
            other.to(state, params)
    with pytest.raises(ValueError, match="state has no RMSPropState in it, got EmptyState"):
        framework.to(optax.EmptyState(), params)


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if "optax" not in f.id])
def test_refuses_incomplete_mappings(framework):
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    missing = {path: leaf for path, leaf in MAPPING.items() if path != "flat"}
    less = {name: leaf for name, leaf in params.items() if name != "flat"}
    with pytest.raises(ValueError, match=r"name every parameter: \['flat'\] are missing"):
        framework.back(given, params, mapping=missing)
    with pytest.raises(ValueError, match=r"'flat.bias'"):
        framework.back(given, params, mapping=MAPPING | {"flat": "flat.bias"})
    with pytest.raises(ValueError, match=r"mapping names nothing of \['flat.weight'\]"):
        framework.back(given, less, mapping=missing)


@pytest.mark.parametrize("name", ["pytorch", "timm", "keras"])
def test_names_are_needed_and_numbers_do_without(name):
    framework = Framework(name, momentum=0.9)
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    with pytest.raises(ValueError, match="names are needed: mapping has names"):
        framework.back(given, params, names=None)
    leaves = {p: leaf if isinstance(leaf, Leaf) else Leaf(leaf) for p, leaf in MAPPING.items()}
    numbered = {p: leaf._replace(name=NAMES.index(leaf.name)) for p, leaf in leaves.items()}
    for names in (None, NAMES):
        found = framework.back(given, params, mapping=numbered, names=names)
        assert_same(found, framework.back(given, params))


def test_names_in_another_order_are_noticed_if_the_optimizer_knows_them():
    """As from a model whose parameters are in groups, in another order than in the model."""
    framework = Framework("pytorch")
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    given["param_groups"] = [
        group([0, 1], param_names=NAMES[:2]),
        group([2, 3], param_names=NAMES[2:]),
    ]
    assert_same(framework.back(given, params, names=None), state)
    assert_same(framework.back(given, params, names=NAMES), state)
    with pytest.raises(ValueError, match=r"names must be those of param_groups, \['cell.weight'"):
        framework.back(given, params, names=sorted(NAMES))
    with pytest.raises(ValueError, match="names must be those of 4 parameters, got 5"):
        framework.back(given, params, names=["a", *NAMES])


def test_groups_with_and_without_momentum_need_a_partition_that_has_them_alike():
    labels = {"fc": "plain", "cell": "plain", "flat": "momentum"}
    parts = {"plain": dialects.pytorch(), "momentum": dialects.pytorch(momentum=0.9)}
    tx = optax.partition(parts, labels)
    groups = [group([0], momentum=0.9), group([1, 2, 3], lr=0.1)]
    names = ["flat.weight", "fc.bias", "cell.weight", "fc.weight"]
    params, state = after(tx, 3, tree())
    given = convert.to_pytorch(state, params, MAPPING, tx, param_groups=groups, names=names)
    assert given["param_groups"] == groups
    assert {n: sorted(held) for n, held in given["state"].items()} == {
        0: ["momentum_buffer", "square_avg", "step"],
        1: ["square_avg", "step"],
        2: ["square_avg", "step"],
        3: ["square_avg", "step"],
    }
    assert_same(convert.from_pytorch(given, params, MAPPING, tx, names=names), state)
    swapped = optax.partition(parts, {"fc": "momentum", "cell": "plain", "flat": "plain"})
    with pytest.raises(ValueError, match=r"momentum for '(flat|fc)"):
        convert.from_pytorch(given, params, MAPPING, swapped, names=names)
    other = [group([0]), group([1, 2, 3], momentum=0.9)]
    with pytest.raises(ValueError, match=r"the state for 'flat.weight' has .*its group wants"):
        convert.to_pytorch(state, params, MAPPING, tx, param_groups=other, names=names)


def test_a_layer_in_two_groups_is_refused_if_only_one_has_momentum():
    labels = {"fc": "plain", "cell": {"i": "plain", "o": "momentum"}, "flat": "plain"}
    parts = {"plain": dialects.pytorch(), "momentum": dialects.pytorch(momentum=0.9)}
    tx = optax.partition(parts, labels)
    params, state = after(tx, 3, tree())
    with pytest.raises(ValueError, match=r"there are 1 of the 2 parts of 'cell.weight'"):
        convert.to_pytorch(
            state, params, MAPPING, tx, param_groups=[group()], names=NAMES, strict=False
        )


def test_numbers_in_the_groups_are_the_users_affair_but_not_the_rule():
    framework = Framework("pytorch", momentum=0.9)
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    given["param_groups"][0] |= {"lr": 1.0, "alpha": 0.5, "eps": 1.0, "momentum": 0.5}
    assert_same(framework.back(given, params), state)
    tx = rmsprop(0.01, momentum=0.9, nesterov=True, lr_in_momentum=False)
    with pytest.raises(ValueError, match=r"param_groups.*eps_in_sqrt.*nesterov.*strict=False"):
        framework.back(given, params, tx)
    assert_same(framework.back(given, params, tx, strict=False), state)


def test_groups_of_timm_that_differ_in_where_the_rate_is():
    tx = dialects.timm(momentum=0.9)
    params, state = after(tx, 3, tree())
    groups = [
        timm_group([0], momentum=0.9),
        timm_group([1, 2, 3], momentum=0.9, lr_in_momentum=False),
    ]
    with pytest.raises(ValueError, match="param_groups differ in lr_in_momentum"):
        convert.to_timm(state, params, MAPPING, tx, param_groups=groups, names=NAMES)


def test_param_groups_that_lack_a_parameter_or_have_one_more():
    framework = Framework("pytorch")
    params, state = after(framework.tx, 3, tree())
    for numbers, names, message in (
        ([0, 1, 2], NAMES[:3], r"mapping names \['fc.bias'\], which no group has"),
        (range(5), [*NAMES, "more"], "mapping names nothing of 'more'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to_pytorch(
                state, params, MAPPING, framework.tx, param_groups=[group(numbers)], names=names
            )


def test_a_late_parameter_starts_as_ours_has_it():
    framework = Framework("timm", momentum=0.9)
    params, state = after(framework.tx, 3, tree())
    given = framework.to(state, params)
    del given["state"][3]
    found = framework.back(given, params)
    np.testing.assert_array_equal(found.nu["fc"]["bias"], 1)
    assert_same(
        (found.nu["fc"]["kernel"], found.trace["flat"]),
        (state.nu["fc"]["kernel"], state.trace["flat"]),
    )


def test_options_of_a_group_are_arguments_of_the_dialect():
    options = convert.pytorch_options(group(lr=np.float32(0.5), weight_decay=1e-4, maximize=True))
    assert options == {
        "lr": 0.5,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "momentum": 0.0,
        "centered": False,
        "maximize": True,
    }
    dialects.pytorch(**options)
    old = {name: group()[name] for name in ("lr", "alpha", "eps", "weight_decay")}
    assert convert.pytorch_options(old)["momentum"] == 0
    corrected = timm_group(corrected_weight_decay=True, max_lr_snapshot=0.3)
    assert convert.timm_options(corrected)["initial_lr"] == 0.3
    dialects.timm(**convert.timm_options(corrected))
    with pytest.raises(ValueError, match="group has no 'max_lr_snapshot'"):
        convert.timm_options(without("max_lr_snapshot")(corrected) or corrected)


class Variable:
    """As Keras's: an array with a path."""

    def __init__(self, path, value):
        self.path, self.value = path, value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


def test_variables_of_keras_are_known_by_their_paths():
    framework = Framework("keras", momentum=0.9)
    params, state = after(framework.tx, 3, tree())
    arrays = framework.to(state, params)
    kinds = ["iteration", "learning_rate", *["a_velocity"] * 4, *["a_momentum"] * 4]
    variables = [Variable(f"rmsprop/{k}", a) for k, a in zip(kinds, arrays, strict=True)]
    assert_same(framework.back(variables, params), state)
    kinds[2:6] = ["a_average"] * 4  # as with use_ema
    variables = [Variable(f"rmsprop/{k}", a) for k, a in zip(kinds, arrays, strict=True)]
    with pytest.raises(
        ValueError, match=r"variables\[2\] is 'rmsprop/a_average', but .* a velocity"
    ):
        framework.back(variables, params)


def test_variables_of_keras_may_come_from_a_file():
    framework = Framework("keras", momentum=0.9, centered=True)
    params, state = after(framework.tx, 3, tree())
    arrays = framework.to(state, params)
    file = {str(i): array for i, array in enumerate(arrays)}
    file = {name: file[name] for name in sorted(file)}  # "1", "10", "11", "2", ...
    again = framework.back(file, params)
    assert_same(again._replace(nu=None), state._replace(nu=None))
    scheduled = convert.to_keras(state, params, MAPPING, framework.tx, names=NAMES)
    assert len(scheduled) == len(arrays) - 1
    assert_same(framework.back(scheduled, params), again)
    narrow = {name: a if a.ndim == 0 else a.astype(jnp.bfloat16) for name, a in file.items()}
    stored = {n: a if a.ndim == 0 else a.view("V2") for n, a in narrow.items()}  # as in HDF5
    assert_same(framework.back(stored, params), framework.back(narrow, params))
    del file["10"]
    with pytest.raises(ValueError, match=r"variables must be '0', '1', ..., got"):
        framework.back(file, params)


def test_keras_has_one_optimizer_for_all():
    parts = {"a": dialects.keras(0.1), "b": dialects.keras(0.1, momentum=0.9)}
    tx = optax.partition(parts, {"fc": "a", "cell": "b", "flat": "b"})
    params, state = after(tx, 3, tree())
    with pytest.raises(ValueError, match=r"one RMSProp for all variables"):
        convert.to_keras(state, params, MAPPING, tx, names=NAMES)
    alike = {"a": dialects.keras(0.1, weight_decay=0.1), "b": dialects.keras(0.1)}
    tx = optax.partition(alike, {"fc": "a", "cell": "b", "flat": "b"})
    params, state = after(tx, 3, tree())
    arrays = convert.to_keras(state, params, MAPPING, tx, names=NAMES)
    assert_same(convert.from_keras(arrays, params, MAPPING, tx, names=NAMES), state)
    with pytest.raises(ValueError, match="mapping must name each of"):
        convert.to_keras(state, params, MAPPING, tx, names=[*NAMES, "more"])


def test_tensorflow_slots_by_name():
    w, ones = np.zeros(2), np.ones(2)
    variables = {"a/w": w, "a/w/RMSProp": ones, "a/w/RMSProp_1": 2 * ones, "global_step": 3}
    slots = convert.tensorflow_v1_slots(variables)
    assert {slot: list(of) for slot, of in slots.items()} == {"rms": ["a/w"], "momentum": ["a/w"]}
    np.testing.assert_array_equal(slots["momentum"]["a/w"], 2)
    centered = convert.tensorflow_v1_slots(variables | {"a/w/RMSProp_2": 3 * ones})
    assert list(centered) == ["rms", "mg", "momentum"]
    np.testing.assert_array_equal(centered["mg"]["a/w"], 2)
    np.testing.assert_array_equal(centered["momentum"]["a/w"], 3)
    with pytest.raises(ValueError, match=r"no variable is named like 'w/Other': .*'a/w'"):
        convert.tensorflow_v1_slots(variables, "Other")
    with pytest.raises(ValueError, match=r"\['b'\] have a slot 'rms' or a slot 'momentum'"):
        convert.tensorflow_v1_slots(variables | {"b": w, "b/RMSProp": ones})
    with pytest.raises(ValueError, match=r"\['b'\] have a slot 'rms' or a slot 'mg'"):
        convert.tensorflow_v1_slots(variables | {f"b/RMSProp{i}": ones for i in ("", "_2")})


def test_tensorflow_keeps_a_momentum_that_is_left_alone():
    tx = dialects.tensorflow_v1(0.1)
    params, state = after(tx, 3, tree())
    slots = convert.to_tensorflow_v1(state, params, MAPPING, tx)
    assert all(not np.any(array) for array in slots["momentum"].values())
    slots["momentum"] = {name: array + 1 for name, array in slots["momentum"].items()}
    again = convert.from_tensorflow_v1(slots, params, MAPPING, tx, steps=3)
    assert_same(again, state)


def test_refuses_states_of_optax_that_are_others():
    theirs, ours = both("all")
    params, there = after(theirs, 3, tree())
    less = {name: leaf for name, leaf in params.items() if name != "flat"}
    with pytest.raises(ValueError, match=r"name every parameter.*flat|mapping names.*flat"):
        convert.from_optax(theirs.init(less), params, ours)
    with pytest.raises(ValueError, match=r"mapping names nothing of \['flat'\]"):
        convert.from_optax(there, less, ours)
    with pytest.raises(ValueError, match="nu of 'flat' has shape"):
        convert.from_optax(there, params | {"flat": jnp.zeros((2, 2))}, ours)
    for state in (optax.adam(0.1).init(params), (there, there), optax.EmptyState()):
        with pytest.raises(ValueError, match=r"opt_state must be of one optax.rmsprop"):
            convert.from_optax(state, params, ours)
    with pytest.raises(ValueError, match=r"bias_correction=False in tx, but not so in the source"):
        convert.from_optax(there, params, both("momentum")[1])
    tx = rmsprop(0.1, lambda count: 0.9, centered=True, momentum=0.9, bias_correction=True)
    with pytest.raises(ValueError, match="one constant decay"):
        convert.from_optax(there, params, tx)
    broken = jax.tree.map(lambda x: x, there)
    broken[0].mu.pop("flat")
    with pytest.raises(ValueError, match=r"nu or mu of \['flat'\], but not both"):
        convert.from_optax(broken, params, ours)
    uneven = (there[0], there[1]._replace(count=jnp.asarray(5)), *there[2:])
    with pytest.raises(ValueError, match=r"counts \[3, 5\]: give steps"):
        convert.from_optax(uneven, params, ours)


def test_refuses_to_fill_states_of_optax_that_are_others():
    theirs, ours = both("centered")
    params, state = after(ours, 3, tree())
    less = {name: leaf for name, leaf in params.items() if name != "flat"}
    more = params | {"more": jnp.zeros(2)}
    for like, message in (
        (theirs.init(less), r"like has no (nu|mu) of \['flat'\]"),
        (theirs.init(more), "like has 'more', and params has not"),
        (theirs.init(params | {"flat": jnp.zeros((2, 2))}), "(nu|mu) of 'flat' has shape"),
        (both("plain")[0].init(params), r"tx has \['mu'\], and like has not"),
        (both("most")[0].init(params), "like has trace, and tx has not"),
        (both("all")[0].init(params), "like has trace, and tx has not"),
        (optax.EmptyState(), r"tx has \['mu', 'nu'\], and like has not"),
        (optax.rmsprop(0.1, centered=True, bias_correction=True).init(params), "bias_correction"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to_optax(state, params, ours, like)


@pytest.mark.parametrize("placed", [False, True])
def test_what_was_free_to_move_stays_so(placed):
    """Parameters on no device in particular may meet a batch on eight."""
    params = {"w": jnp.ones(8)}
    if placed:
        params = jax.device_put(params, jax.devices()[1])
    new = convert.params_from({"w": np.arange(8.0)}, params, {"w": "w"})
    assert new["w"].committed == placed
    assert new["w"].sharding == params["w"].sharding
