"""Bad input of conversions raises an error that names the entry, and changes nothing."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conversions import (
    FRAMEWORKS,
    MAPPING,
    NAMES,
    Framework,
    assert_same,
    begun,
    group,
    timm_group,
    tree,
)
from rmsprop_jax import convert, rmsprop
from rmsprop_jax.convert import Leaf


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


def spoiled(*keys_and_value):
    """Puts a number into an array."""

    def change(given):
        *keys, last, value = keys_and_value
        for key in keys:
            given = given[key]
        given[last] = np.array(given[last])
        given[last].flat[0] = value

    return change


@dataclasses.dataclass
class Meta:
    """What counts of a tensor of PyTorch without numbers."""

    is_meta: bool = True

    def detach(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


@dataclasses.dataclass
class Spread:
    """What counts of a DTensor."""

    def full_tensor(self):
        raise NotImplementedError


def flattened(given):
    """PyTorch's flattened form, in the place of the plain one."""
    (options,) = given["param_groups"]
    names = [NAMES[number] for number in options.pop("params")]
    flat = {
        f"state.{NAMES[number]}.{slot}": array
        for number, slots in given["state"].items()
        for slot, array in slots.items()
    }
    flat |= {f"param_groups.{name}.{key}": v for name in names for key, v in options.items()}
    given.clear()
    given.update(flat)


def flattened_but(change):
    return lambda given: (flattened(given), change(given))


def in_the_place_of_velocities(value):
    """Puts arrays before Keras's velocities, of the same shapes, and its momenta out."""

    def change(given):
        given[2:] = [*(np.full_like(array, value) for array in given[2:6]), *given[2:6]]

    return change


MOMENTUM = {"momentum": 0.9}
WRONG = np.ones((7, 7), np.float32)
BAD_CHECKPOINTS = [
    ("pytorch", without("state"), "state_dict has no 'state'"),
    ("pytorch", without("param_groups"), "state_dict has no 'param_groups'"),
    ("pytorch", without("state", 1, "square_avg"), r"state\[1\] has \['momentum_buffer', 'step'\]"),
    ("pytorch", without("state", 1, "momentum_buffer"), r"state\[1\] has \['square_avg', 'step'\]"),
    ("pytorch", without("state", 1, "step"), r"state\[1\] has"),
    ("pytorch", replaced("state", 1, "step", [7.0]), None),
    ("pytorch", replaced("state", 1, "step", 7), None),
    ("pytorch", replaced("state", 1, "step", [7.0, 7.0]), r"state\[1\]\['step'\] must be how many"),
    ("pytorch", replaced("state", 1, "step", 0.5), r"\['step'\] must be how many .* got 0.5"),
    ("pytorch", replaced("state", 1, "step", -1), r"\['step'\] must be how many .* got -1"),
    ("pytorch", replaced("state", 1, "step", np.nan), r"\['step'\] must be how many .* got nan"),
    ("pytorch", replaced("state", 1, "step", np.inf), r"\['step'\] must be how many .* got inf"),
    ("pytorch", replaced("state", 1, "step", Meta()), r"state\[1\]\['step'\] is on PyTorch's meta"),
    (
        "pytorch",
        replaced("state", 2, "square_avg", Meta()),
        r"state\[2\]\['square_avg'\] is on PyTorch's meta device.*: load the real ones",
    ),
    (
        "pytorch",
        replaced("state", 2, "square_avg", Spread()),
        r"state\[2\]\['square_avg'\] is spread over several processes: save whole tensors",
    ),
    (
        "pytorch",
        replaced("state", 1, "grad_avg", WRONG),
        r"state\[1\] has \['grad_avg'\] left over.*: to continue .* ignore=\('grad_avg',\)",
    ),
    ("pytorch", replaced("state", 1, "exp_avg", WRONG), r"state\[1\] has \['exp_avg'"),
    ("pytorch", flattened, None),
    (
        "pytorch",
        flattened_but(replaced("epoch", 3)),
        "state_dict has 'epoch': a flattened state must have only keys like 'state.fc.weight.step'",
    ),
    (
        "pytorch",
        flattened_but(without("state.fc.bias.step")),
        r"state\['fc.bias'\] has \['momentum_buffer', 'square_avg'\]",
    ),
    (
        "pytorch",
        flattened_but(replaced("state.more.square_avg", WRONG)),
        r"a state for \['more'\], which is in no group",
    ),
    (
        "pytorch",
        flattened_but(without("param_groups.fc.bias.alpha")),
        "group has no 'alpha': it is from another",
    ),
    (
        "pytorch",
        replaced("param_groups", 0, "params", NAMES[::-1]),
        "names must be those of param_groups",
    ),
    ("pytorch", replaced("state", 4, {}), r"a state for \[4\], which is in no group"),
    (
        "pytorch",
        replaced("state", 0, "square_avg", WRONG),
        r"nu of 'cell.weight' has shape \(7, 7\)",
    ),
    ("pytorch", replaced("state", 3, "momentum_buffer", WRONG), r"trace of 'fc.bias' has shape"),
    ("pytorch", without("param_groups", 0, "alpha"), "group has no 'alpha': it is from another"),
    ("pytorch", replaced("param_groups", 0, timm_group()), "it is from timm's RMSpropTF"),
    ("pytorch", replaced("param_groups", 0, "params", [0, 1, 2]), "names must be those of 3"),
    ("pytorch", replaced("param_groups", 0, "maximize", True), r"\[0\] has {'maximize': True}"),
    ("pytorch", replaced("param_groups", 0, "weight_decay", 0.1), "{'weight_decay': True}"),
    ("pytorch", replaced("param_groups", 0, "centered", True), "{'centered': True}"),
    ("pytorch", replaced("param_groups", 0, "momentum", 0.0), "{'momentum': False}"),
    ("pytorch", replaced("param_groups", 0, "param_names", NAMES[::-1]), "names must be those of"),
    ("timm", replaced("param_groups", 0, group()), "it is not from timm's RMSpropTF"),
    ("timm", replaced("param_groups", 0, "decoupled_decay", None), "decoupled_decay must be"),
    ("timm", replaced("param_groups", 0, "caution", True), "{'cautious': True}"),
    ("timm", replaced("param_groups", 0, "weight_decay", 0.1), "{'weight_decay': True}"),
    ("timm", without("state", 2, "step"), r"state\[2\] has"),
    ("timm", replaced("state", 2, "step", [7]), None),
    ("timm", replaced("state", 2, "grad_avg", WRONG), r"state\[2\] has \['grad_avg'\] left over"),
    ("timm", flattened, None),
    ("keras", without(-1), r"nu of 'cell.weight' has shape \(\)"),  # the rate, as if scheduled
    (
        "keras",
        without(slice(-2, None)),
        r"4 each of \['velocity', 'momentum'\], as tx has them; got",
    ),
    ("keras", without(0), r"4 each of \['velocity', 'momentum'\]"),
    ("keras", lambda given: given.append(WRONG), r"4 each of \['velocity', 'momentum'\]"),
    ("keras", replaced(2, WRONG), "nu of 'cell.weight' has shape"),
    ("keras", replaced(9, WRONG), "trace of 'fc.bias' has shape"),
    ("keras", replaced(0, WRONG), r"got arrays of shapes \[\(7, 7\), \(\)"),
    (
        "keras",
        in_the_place_of_velocities(-1.0),
        r"below 0 where the .*ignore=\('average',\)",
    ),
    ("keras", in_the_place_of_velocities(0.0), "are 0 where the .* are not.*accumulation_steps"),
    ("keras", lambda given: given.insert(2, WRONG), "more .* ignore=.*LossScaleOptimizer"),
    ("tensorflow", replaced("velocity", {}), r"must be 'rms', 'momentum' .* got \['velocity'\]"),
    ("tensorflow", without("rms"), "slots must have 'rms'"),
    ("tensorflow", without("momentum"), "tx has momentum for .*, but the source does not"),
    (
        "tensorflow",
        without("rms", "fc.bias"),
        r"\['rms'\] and .*'momentum'\] differ in \['fc.bias'\]",
    ),
    ("tensorflow", without("momentum", "fc.bias"), r"differ in \['fc.bias'\]"),
    ("tensorflow", replaced("rms", "fc.bias", WRONG), "nu of 'fc.bias' has shape"),
    ("tensorflow", replaced("mg", {}), None),  # as good as none
    # What no gradients leave behind.
    ("pytorch", spoiled("state", 1, "square_avg", np.nan), "nu of 'flat.weight' .* not finite"),
    ("pytorch", spoiled("state", 1, "momentum_buffer", np.inf), "trace of 'flat.w.* not finite"),
    ("pytorch", spoiled("state", 1, "square_avg", -1.0), "nu of 'flat.weight' .* contains -1.0"),
    ("timm", spoiled("state", 0, "square_avg", np.inf), "nu of 'cell.weight' .* not finite"),
    ("keras", spoiled(3, -9.0), "nu of 'flat.weight' is a second moment, but contains -9.0"),
    ("keras", spoiled(9, np.nan), "trace of 'fc.bias' has numbers that are not finite"),
    ("tensorflow", spoiled("rms", "fc.bias", -1.0), "nu of 'fc.bias' is a second moment"),
    ("tensorflow", spoiled("momentum", "fc.bias", np.inf), "trace of 'fc.bias' .* not finite"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_CHECKPOINTS)
def test_refuses_checkpoints(name, change, message):
    framework = Framework(name, **MOMENTUM)
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    change(given)
    before = copy.deepcopy(given)
    if message is None:
        assert_same(framework.back(given, params), state)
    else:
        with pytest.raises((ValueError, TypeError), match=message):
            framework.back(given, params)
    jax.tree.map(np.testing.assert_array_equal, given, before)
    assert jax.tree.structure(given) == jax.tree.structure(before)


def test_a_second_moment_below_0_by_rounding_is_0():
    framework = Framework("pytorch")
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    spoiled("state", 3, "square_avg", -1e-9)(given)
    found = framework.back(given, params)
    np.testing.assert_array_equal(found.nu["fc"]["bias"], [0, state.nu["fc"]["bias"][1]])


def test_a_number_of_steps_is_none_below_0():
    framework = Framework("tensorflow")
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    with pytest.raises(ValueError, match="taken -1 steps: it must be at least 0"):
        convert.from_tensorflow_v1(given, params, MAPPING, framework.tx, steps=-1)


@pytest.mark.parametrize("form", [{}, {"momentum": 0.9}, {"centered": True}])
@pytest.mark.parametrize("other", [{}, {"momentum": 0.9}, {"centered": True}])
@pytest.mark.parametrize("name", ["pytorch", "timm", "keras", "tensorflow", "optax"])
def test_refuses_another_form(name, form, other):
    """What tx has and the source has not, and the other way round."""
    framework, wanted = Framework(name, **form), Framework(name, **other)
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    if form == other:
        found = wanted.back(given, params)
        assert_same(found._replace(nu=None), state._replace(nu=None))
        return
    # TensorFlow keeps a momentum even where there is none, and Keras one more array, of the same
    # shapes, in either.
    untold = {"tensorflow": {*form, *other} == {"momentum"}, "keras": form and other}
    if untold.get(name):
        found = wanted.back(given, params)
        assert (found.trace is None, found.mu is None) == tuple(
            kind not in other for kind in ("momentum", "centered")
        )
    else:
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
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    for tx in (optax.rmsprop(0.1), optax.inject_hyperparams(optax.rmsprop)(0.1), None):
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
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    missing = {path: leaf for path, leaf in MAPPING.items() if path != "flat"}
    less = {name: leaf for name, leaf in params.items() if name != "flat"}
    with pytest.raises(ValueError, match=r"name every parameter: \['flat'\] are missing"):
        framework.back(given, params, mapping=missing)
    with pytest.raises(ValueError, match=r"'flat.bias'"):
        framework.back(given, params, mapping=MAPPING | {"flat": "flat.bias"})
    with pytest.raises(ValueError, match=r"mapping has no entry for \['flat.weight'\]"):
        framework.back(given, less, mapping=missing)


def test_refuses_leaves_of_the_same_path():
    params, tx = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, rmsprop(0.1)
    with pytest.raises(ValueError, match="must have different paths, got 'a/b' for two leaves"):
        convert.params_from({"x": np.ones(2)}, params, {"a/b": "x"})
    opt_state = optax.rmsprop(0.1).init(params)
    with pytest.raises(ValueError, match="must have different paths, got 'a/b' for two leaves"):
        convert.from_optax(opt_state, params, tx)
    with pytest.raises(ValueError, match="must have different paths, got 'a/b' for two leaves"):
        convert.to_optax(tx.init(params), params, tx, opt_state)


@pytest.mark.parametrize("name", ["pytorch", "timm", "keras"])
def test_names_are_needed_and_numbers_do_without(name):
    framework = Framework(name, momentum=0.9)
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    with pytest.raises(ValueError, match="names are needed: mapping has names"):
        framework.back(given, params, names=None)
    leaves = {p: leaf if isinstance(leaf, Leaf) else Leaf(leaf) for p, leaf in MAPPING.items()}
    numbered = {p: leaf._replace(name=NAMES.index(leaf.name)) for p, leaf in leaves.items()}
    for names in (None, NAMES):
        found = framework.back(given, params, mapping=numbered, names=names)
        assert_same(found, state)


def test_parameters_without_numbers():
    with pytest.raises(ValueError, match="'x' is on PyTorch's meta device"):
        convert.params_from({"x": Meta()}, {"w": jnp.ones(2)}, {"w": "x"})
    with pytest.raises(ValueError, match="'x' is spread over several processes"):
        convert.params_from({"x": Spread()}, {"w": jnp.ones(2)}, {"w": "x"})


def test_two_rules_for_a_parameter_are_filled_alike_and_refused_on_the_way_back():
    framework = Framework("keras", momentum=0.9)
    params, state = begun(framework.tx, tree())
    tx = optax.chain(framework.tx, framework.tx)
    found = framework.back(framework.to(state, params), params, tx)
    assert_same(found, (state, state))
    with pytest.raises(ValueError, match=r"state has '.*' twice"):
        convert.to_keras(found, params, MAPPING, tx, names=NAMES)
