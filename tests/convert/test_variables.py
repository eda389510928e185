"""Variables of Keras and TensorFlow 1: by their paths, from files, and slots by their names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conversions import MAPPING, NAMES, Framework, assert_same, begun, tree
from rmsprop_jax import convert, dialects


class Variable:
    """As Keras's: an array with a path."""

    def __init__(self, path, value):
        self.path, self.value = path, value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


def test_variables_of_keras_are_known_by_their_paths():
    framework = Framework("keras", momentum=0.9)
    params, state = begun(framework.tx, tree())
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


def test_variables_of_keras_in_the_midst_of_small_batches():
    """Seven of two a step are three steps; what was gathered of the fourth is left out."""
    framework = Framework("keras", momentum=0.9)
    params, state = begun(framework.tx, tree())
    arrays = framework.to(state, params)
    arrays[2:2] = arrays[6:]  # as accumulators
    tx = optax.MultiSteps(framework.tx, 2).gradient_transformation()
    found = framework.back(arrays, params, tx, gradient_accumulation_steps=2)
    assert_same(found.inner_opt_state, state._replace(count=jnp.asarray(3, jnp.int32)))
    assert (found.gradient_step, found.mini_step) == (3, 0)
    assert not any(np.any(a) for a in jax.tree.leaves(found.acc_grads))


def test_variables_of_keras_by_their_paths():
    framework = Framework("keras", centered=True)
    params, state = begun(framework.tx, tree())
    arrays = framework.to(state, params)
    slots = [f"{i}_{slot}" for slot in ("velocity", "average_gradient") for i in range(4)]
    paths = [f"rmsprop/{name}" for name in ("iteration", "learning_rate", *slots)]
    by_path = dict(zip(paths, arrays, strict=True))
    want = framework.back(arrays, params)
    assert_same(framework.back(by_path, params), want)
    swapped = by_path | {paths[2]: by_path[paths[6]], paths[6]: by_path[paths[2]]}
    order = [paths[6] if p == paths[2] else paths[2] if p == paths[6] else p for p in paths]
    with pytest.raises(ValueError, match=r"\[2\] is 'rmsprop/0_average_gradient', but .* a vel"):
        framework.back({path: swapped[path] for path in order}, params)


def test_variables_of_keras_may_come_from_a_file():
    framework = Framework("keras", momentum=0.9, centered=True)
    params, state = begun(framework.tx, tree())
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
    params, state = begun(tx, tree())
    with pytest.raises(ValueError, match=r"one RMSProp for all variables"):
        convert.to_keras(state, params, MAPPING, tx, names=NAMES)
    alike = {"a": dialects.keras(0.1, weight_decay=0.1), "b": dialects.keras(0.1)}
    tx = optax.partition(alike, {"fc": "a", "cell": "b", "flat": "b"})
    params, state = begun(tx, tree())
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
    two = {f"a/w/RMSProp_{i}": ones for i in (2, 3)}  # the rms and momentum of another
    with pytest.raises(ValueError, match=r"\['a/w'\] have four slots 'RMSProp' or more"):
        convert.tensorflow_v1_slots(variables | two)


def test_legacy_keras_has_no_slot_of_a_momentum_that_is_off():
    """As its checkpoints have it, recorded from tf_keras 2.21."""
    name = "{}/.OPTIMIZER_SLOT/optimizer/{}/.ATTRIBUTES/VARIABLE_VALUE"
    plain = {name.format(of, "rms"): np.ones(2) for of in "ab"}
    assert convert.tensorflow_v1_slots(plain, "optimizer").keys() == {"rms"}
    tx = dialects.keras_legacy(0.1)
    slots = convert.tensorflow_v1_slots(plain, "optimizer")
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = convert.from_tensorflow_v1(slots, params, {"a": "a", "b": "b"}, tx, steps=7)
    assert state.count == 7
    np.testing.assert_array_equal(state.nu["b"], 1)
    centered = plain | {name.format("a", "mg"): np.zeros(2)}
    with pytest.raises(ValueError, match=r"\['b'\] have a slot 'rms' or a slot 'mg'"):
        convert.tensorflow_v1_slots(centered, "optimizer")


def test_tensorflow_keeps_a_momentum_that_is_left_alone():
    tx = dialects.tensorflow_v1(0.1)
    params, state = begun(tx, tree())
    slots = convert.to_tensorflow_v1(state, params, MAPPING, tx)
    assert all(not np.any(array) for array in slots["momentum"].values())
    slots["momentum"] = {name: array + 1 for name, array in slots["momentum"].items()}
    again = convert.from_tensorflow_v1(slots, params, MAPPING, tx, steps=7)
    assert_same(again, state)
