"""Frozen parameters, for which tx keeps no state and the framework may or may not."""

import jax
import numpy as np
import optax
import pytest

from conversions import FRAMEWORKS, MAPPING, NAMES, Framework, assert_same, begun, group, tree
from rmsprop_jax import convert, dialects, rmsprop
from storages import ours

HEAD = {"fc/kernel": MAPPING["fc/kernel"], "fc/bias": MAPPING["fc/bias"]}
LABELS = {"fc": "train", "cell": "frozen", "flat": "frozen"}
TRAINED = {"fc": True, "cell": False, "flat": False}
KEPT = ["fc.weight", "fc.bias"]


def partition(tx):
    return optax.partition({"train": tx, "frozen": optax.set_to_zero()}, LABELS)


def masked(tx):
    return optax.masked(tx, TRAINED)


def head(state):
    """The slots of the layer that is trained."""
    return [held and held["fc"] for held in (state.nu, state.mu, state.trace)]


@pytest.mark.parametrize("freeze", [partition, masked])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_trained_all_goes_on_with_a_part_of_it(framework, freeze):
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    found = framework.back(given, params, freeze(framework.tx))
    assert_same(head(ours(found)), head(framework.back(given, params)))
    assert len(jax.tree.leaves(ours(found).nu)) == 2


def test_a_head_alone_goes_on_and_back(subtests):
    """Of an optimizer that was given nothing else; whether the mapping names the rest or not."""
    params, tx = tree(), partition(dialects.pytorch(momentum=0.9))
    _, state = begun(tx, params)
    groups = [group([0, 1], momentum=0.9)]
    for mapping in (HEAD, MAPPING):
        with subtests.test(named=len(mapping)):
            given = convert.to_pytorch(state, params, mapping, tx, param_groups=groups, names=KEPT)
            assert sorted(given["state"]) == [0, 1]
            assert_same(convert.from_pytorch(given, params, mapping, tx, names=KEPT), state)


def test_pytorch_keeps_no_state_of_what_never_had_a_gradient():
    """As of requires_grad=False, of an optimizer that was given all parameters."""
    params, tx = tree(), masked(dialects.pytorch())
    _, state = begun(tx, params)
    given = convert.to_pytorch(state, params, MAPPING, tx, param_groups=[group()], names=NAMES)
    found = {NAMES[number]: set(slots) for number, slots in given["state"].items()}
    assert found == {name: {"square_avg", "step"} for name in KEPT}
    assert_same(convert.from_pytorch(given, params, MAPPING, tx, names=NAMES), state)
    with pytest.raises(ValueError, match=r"mapping has no entry for \['cell.weight', 'flat.wei"):
        convert.from_pytorch(given, params, HEAD, tx, names=NAMES)


def test_keras_and_tensorflow_and_optax_of_a_head():
    params = tree()
    for name in ("keras", "tensorflow"):
        framework = Framework(name, momentum=0.9)
        tx = partition(framework.tx)
        _, state = begun(tx, params)
        if name == "keras":
            given = convert.to_keras(state, params, MAPPING, tx, names=KEPT)
            assert len(given) == 5
            assert_same(convert.from_keras(given, params, MAPPING, tx, names=KEPT), state)
            with pytest.raises(ValueError, match=r"mapping must name each of .*'cell.weight'"):
                convert.to_keras(state, params, MAPPING, tx, names=NAMES)
        else:
            slots = convert.to_tensorflow_v1(state, params, MAPPING, tx)
            assert list(slots["rms"]) == KEPT
            found = convert.from_tensorflow_v1(slots, params, HEAD, tx, steps=7)
            assert_same(found, state)
    theirs, tx = partition(optax.rmsprop(0.1)), partition(rmsprop(0.1))
    _, state = begun(tx, params)
    given = convert.to_optax(state, params, tx, theirs.init(params))
    assert jax.tree.structure(given) == jax.tree.structure(theirs.init(params))
    assert_same(convert.from_optax(given, params, tx, steps=7), state)
    every = convert.to_optax(state, params, tx, optax.rmsprop(0.1).init(params))
    assert_same(every[0].nu["fc"], ours(state).nu["fc"])
    np.testing.assert_array_equal(every[0].nu["flat"], 0)  # as it was made


def test_two_groups_of_optax():
    params, parts = tree(), {"fc": "a", "cell": "b", "flat": "b"}
    theirs, tx = (
        optax.partition({"a": make(0.1, momentum=0.9), "b": make(0.2, momentum=0.5)}, parts)
        for make in (optax.rmsprop, rmsprop)
    )
    opt_state, mine = theirs.init(params), tx.init(params)
    for seed in range(3):
        _, opt_state = theirs.update(tree(seed), opt_state, params)
        _, mine = tx.update(tree(seed), mine, params)
    found = convert.from_optax(opt_state, params, tx, steps=3)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(mine), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    back = convert.to_optax(found, params, tx, theirs.init(params))
    assert_same(back, opt_state)


def test_what_is_refused():
    params, tx = tree(), partition(dialects.pytorch())
    _, state = begun(dialects.pytorch(), params)
    given = Framework("pytorch").to(state, params)
    with pytest.raises(ValueError, match=r"name every parameter: \['fc/bias'\] are missing"):
        convert.from_pytorch(given, params, {"fc/kernel": HEAD["fc/kernel"]}, tx, names=NAMES)
    with pytest.raises(ValueError, match=r"mapping names \['more'\], but params has only"):
        convert.from_pytorch(given, params, MAPPING | {"more": "x"}, tx, names=NAMES)
    with pytest.raises(ValueError, match=r"mapping names \['other'\], but the source has only"):
        convert.from_pytorch(given, params, MAPPING | {"fc/bias": "other"}, tx, names=NAMES)
    none = optax.masked(dialects.pytorch(), jax.tree.map(lambda _: False, params))
    with pytest.raises(ValueError, match="tx keeps no state for any parameter"):
        convert.from_pytorch(given, params, MAPPING, none, names=NAMES)
    half = optax.masked(
        dialects.pytorch(), {"fc": True, "cell": {"i": True, "o": False}, "flat": True}
    )
    with pytest.raises(ValueError, match=r"there are 1 of the 2 parts of 'cell.weight'"):
        convert.to_pytorch(
            half.init(params), params, MAPPING, half, param_groups=[group()], names=NAMES
        )
    flat = optax.flatten(dialects.pytorch())
    with pytest.raises(ValueError, match="tx keeps its state in another form than params"):
        convert.from_pytorch(given, params, MAPPING, flat, names=NAMES)
