"""Groups of PyTorch and timm: their names, their rules, and the transformations they allow."""

import numpy as np
import optax
import pytest

from conversions import MAPPING, NAMES, Framework, assert_same, begun, group, timm_group, tree
from rmsprop_jax import convert, dialects, rmsprop


def test_names_in_another_order_are_noticed_if_the_optimizer_knows_them():
    """As from a model whose parameters are in groups, in another order than in the model."""
    framework = Framework("pytorch")
    params, state = begun(framework.tx, tree())
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
    params, state = begun(tx, tree())
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
    with pytest.raises(ValueError, match=r"the state for 'flat.weight' has .*its group needs"):
        convert.to_pytorch(state, params, MAPPING, tx, param_groups=other, names=names)


def test_a_layer_in_two_groups_is_refused_if_only_one_has_momentum():
    labels = {"fc": "plain", "cell": {"i": "plain", "o": "momentum"}, "flat": "plain"}
    parts = {"plain": dialects.pytorch(), "momentum": dialects.pytorch(momentum=0.9)}
    tx = optax.partition(parts, labels)
    params, state = begun(tx, tree())
    with pytest.raises(ValueError, match=r"there are 1 of the 2 parts of 'cell.weight'"):
        convert.to_pytorch(
            state, params, MAPPING, tx, param_groups=[group()], names=NAMES, strict=False
        )


def test_numbers_in_the_groups_are_the_users_affair_but_not_the_rule():
    framework = Framework("pytorch", momentum=0.9)
    params, state = begun(framework.tx, tree())
    given = framework.to(state, params)
    given["param_groups"][0] |= {"lr": 1.0, "alpha": 0.5, "eps": 1.0, "momentum": 0.5}
    assert_same(framework.back(given, params), state)
    tx = rmsprop(0.01, momentum=0.9, nesterov=True, lr_in_momentum=False)
    with pytest.raises(ValueError, match=r"param_groups.*eps_in_sqrt.*nesterov.*strict=False"):
        framework.back(given, params, tx)
    assert_same(framework.back(given, params, tx, strict=False), state)


def test_groups_of_timm_that_differ_in_where_the_rate_is():
    tx = dialects.timm(momentum=0.9)
    params, state = begun(tx, tree())
    groups = [
        timm_group([0], momentum=0.9),
        timm_group([1, 2, 3], momentum=0.9, lr_in_momentum=False),
    ]
    with pytest.raises(ValueError, match="param_groups differ in lr_in_momentum"):
        convert.to_timm(state, params, MAPPING, tx, param_groups=groups, names=NAMES)


def test_param_groups_that_lack_a_parameter_or_have_one_more():
    framework = Framework("pytorch")
    params, state = begun(framework.tx, tree())
    for numbers, names, message in (
        ([0, 1, 2], NAMES[:3], r"mapping names \['fc.bias'\], which is in no group"),
        (range(5), [*NAMES, "more"], "mapping has no entry for 'more'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to_pytorch(
                state, params, MAPPING, framework.tx, param_groups=[group(numbers)], names=names
            )


def test_a_late_parameter_starts_as_ours_has_it():
    framework = Framework("timm", momentum=0.9)
    params, state = begun(framework.tx, tree())
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
    old["decoupled_decay"] = False
    assert convert.timm_options(old)["lr_in_momentum"] is True
    corrected = timm_group(corrected_weight_decay=True, max_lr_snapshot=0.3)
    assert convert.timm_options(corrected)["initial_lr"] == 0.3
    dialects.timm(**convert.timm_options(corrected))
    del corrected["max_lr_snapshot"]
    with pytest.raises(ValueError, match="group has no 'max_lr_snapshot'"):
        convert.timm_options(corrected)
