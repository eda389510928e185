"""bitsandbytes' RMSprop, in 32 and 8 bits, from its recorded checkpoints."""

import copy

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import record_bitsandbytes as recorded
from rmsprop_jax import convert, dialects

RECORD = recorded.load()
MAPPING = {"kernel": convert.Leaf(0, (1, 0)), "bias": 1}
K = recorded.K


def params_of(name):
    arrays = RECORD[name]
    return {"kernel": jnp.asarray(arrays["weight"].T), "bias": jnp.asarray(arrays["bias"])}


def resumed(state_dict):
    """Our end of the run that bitsandbytes began."""
    params = params_of("middle")
    saved = convert.bitsandbytes_state_dict(state_dict)
    tx = dialects.pytorch(**convert.pytorch_options(saved["param_groups"][0]))
    state = convert.from_pytorch(saved, params, MAPPING, tx)
    assert int(state.count) == K
    for step in range(K, 2 * K):
        grads = {"kernel": RECORD["grads"]["weight"][step].T, "bias": RECORD["grads"]["bias"][step]}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_a_run_goes_on():
    for name, value in params_of("end 32").items():
        got = resumed(RECORD["state 32"])[name]
        np.testing.assert_allclose(got, value, 0, recorded.TOLERANCE)


def test_eight_bits_are_those_that_bitsandbytes_reads():
    saved = convert.bitsandbytes_state_dict(RECORD["state 8"])
    np.testing.assert_array_equal(saved["state"][0]["square_avg"], RECORD["dequantized"])
    small = RECORD["state 8"]["state"][1]["__bnb_optimizer_quant_state__"]["state1"]
    np.testing.assert_array_equal(saved["state"][1]["square_avg"], small)
    exact = convert.bitsandbytes_state_dict(RECORD["state 32"])["state"][0]["square_avg"]
    worst = np.max(abs(saved["state"][0]["square_avg"] - exact))
    assert 0 < worst < 0.02 * np.max(exact)


def test_the_form_of_before_0_44():
    old = copy.deepcopy(RECORD["state 8"])
    for number, slots in old["state"].items():
        old["state"][number] = {"step": slots["step"]} | slots["__bnb_optimizer_quant_state__"]
    new = convert.bitsandbytes_state_dict(RECORD["state 8"])
    found = convert.bitsandbytes_state_dict(old)
    np.testing.assert_array_equal(found["state"][0]["square_avg"], new["state"][0]["square_avg"])


def changed(**slots):
    """The checkpoint in 8 bits, its first state with other slots; None takes one away."""
    state_dict = copy.deepcopy(RECORD["state 8"])
    held = state_dict["state"][0]["__bnb_optimizer_quant_state__"]
    held.update(slots)
    for name in [name for name, value in held.items() if value is None]:
        del held[name]
    return state_dict


def with_group(**options):
    return RECORD["state 32"] | {"param_groups": [RECORD["state 32"]["param_groups"][0] | options]}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "state_dict has no 'state'"),
        (changed(state2=np.ones(3)), r"state\[0\] must have 'step' and 'state1' .*'state2'"),
        (changed(absmax1=None, max1=np.ones(1)), r"state\[0\] must have .* got \['max1'"),
        (changed(qmap1=None, absmax1=None), r"state\[0\] has 'state1' in uint8, and no 'qmap1'"),
        (changed(absmax1=np.ones(1, "f4")), r"state\[0\] has 1 elements in 'absmax1' for 300"),
        (with_group(betas=(0.9, 0.99)), r"betas of \(alpha, 0\), got \(0.9, 0.99\)"),
        (with_group(betas=(0.0, 0.0)), r"got \(0.0, 0.0\): it is from another optimizer"),
    ],
)
def test_refused(state_dict, message):
    with pytest.raises(ValueError, match=message):
        convert.bitsandbytes_state_dict(state_dict)


def test_what_was_not_read_is_called_by_name():
    params, tx = params_of("middle"), dialects.pytorch(weight_decay=0.1)
    with pytest.raises(ValueError, match=r"no 'alpha': it is from bitsandbytes \(see bits"):
        convert.from_pytorch(RECORD["state 32"], params, MAPPING, tx)
