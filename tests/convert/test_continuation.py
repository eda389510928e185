"""Runs that another framework begins and we continue, compared with its recorded checkpoints.

tests/compare/record_convert.py describes what is recorded. It also continues in the frameworks what
we begin, for which they have to be installed.
"""

import jax
import numpy as np
import pytest

import cases
from checkpoint_cases import CASES, error, problem, theirs
import checkpoints
import record_convert
from rmsprop_jax import convert

RECORDS = {framework: record_convert.load(framework) for framework in CASES}
EVERY = [
    pytest.param(framework, listed, id="-".join([framework, *["late"] * late]))
    for framework, cases_of in CASES.items()
    for late in (False, True)
    if (listed := [case for case in cases_of if case.late == late])
]


def recorded(framework, listed, dtype):
    return [RECORDS[framework]["cases"][case.name][dtype] for case in listed]


@pytest.mark.parametrize(("framework", "listed"), EVERY)
def test_goes_on_and_is_gone_on_with(framework, listed, subtests):
    """From the framework's checkpoint to the framework's end; and our checkpoint is its own."""
    for dtype in record_convert.DTYPES:
        found = record_convert.errors(framework, listed, dtype, RECORDS[framework])
        for case in listed:
            with subtests.test(case=case.name, dtype=dtype):
                errors = found[case.name]
                assert set(errors) == {"k there, k here", "checkpoint at k"}
                assert max(errors.values()) <= cases.TOLERANCE[dtype], errors


@pytest.mark.parametrize(("framework", "listed"), EVERY)
def test_every_checkpoint_shows(framework, listed, subtests):
    """Going on with a new state instead ends elsewhere."""
    parts = recorded(framework, listed, "float64")
    ends = record_convert.ended_here(framework, listed, "float64", parts, anew=True)
    for case, part, end in zip(listed, parts, ends, strict=True):
        with subtests.test(case=case.name):
            start = theirs(framework, problem(case, "float64")[1])
            assert error(case, start, end, part["final"]) > 1e-3


@pytest.mark.parametrize("framework", CASES)
def test_there_and_back_is_the_identity(framework, subtests):
    """Bit for bit; of what is centered, the second moment within one rounding."""
    for dtype in record_convert.DTYPES:
        parts = recorded(framework, CASES[framework], dtype)
        for case, part in zip(CASES[framework], parts, strict=True):
            with subtests.test(case=case.name, dtype=dtype):
                assert_there_and_back(framework, case, dtype, part)


def assert_there_and_back(framework, case, dtype, part):
    with jax.enable_x64(dtype == "float64"):
        params, tx, state = record_convert.at_k(framework, case, dtype, part)
        groups = record_convert.groups_of(framework, part)
        given = checkpoints.to_theirs(framework, case, state, params, tx, groups)
        again = checkpoints.from_theirs(framework, case, given, params, tx)
    got, want = checkpoints.comparable(framework, case, given, part["checkpoint"])
    assert want
    for (slot, name), array in want.items():
        if slot == "learning_rate":
            assert float(array) == array.dtype.type(got[slot, name])
            continue
        assert got[slot, name].dtype == array.dtype or slot == "iteration"
        if case.centered and slot in checkpoints.SECOND_MOMENT:
            assert_one_rounding(got[slot, name], array, array)
        else:
            np.testing.assert_array_equal(got[slot, name], array, err_msg=f"{slot} {name}")
    if not case.centered:
        jax.tree.map(np.testing.assert_array_equal, again, state)


def assert_one_rounding(got, want, size):
    """To the precision of an array of that size."""
    for part in (np.real, np.imag):
        assert np.all(np.abs(part(got) - part(want)) <= np.spacing(np.abs(part(size))))


def test_slots_of_a_tensorflow_checkpoint_of_objects():
    record = RECORDS["tensorflow_v1"]["objects"]
    slots = convert.tensorflow_v1_slots(record["variables"], "optimizer")
    assert set(slots) == set(record["slots"]) == {"rms", "mg", "momentum"}
    for slot, values in record["slots"].items():
        assert set(slots[slot]) == set(values)
        for name, value in values.items():
            np.testing.assert_array_equal(slots[slot][name], value)


def test_other_gradients_are_noticed(monkeypatch):
    monkeypatch.setattr(cases, "checksum", lambda: "another")
    with pytest.raises(ValueError, match="recorded from other gradients"):
        record_convert.load("keras")
