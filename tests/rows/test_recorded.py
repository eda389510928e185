"""Recorded steps on the rows of a table, compared with their rules in NumPy.

tests/compare/record_rows.py describes what is recorded, tests/rows_reference.py the rules.
"""

import jax
import numpy as np
import pytest

import cases
import frameworks
import record_rows
from rmsprop_jax import rows
import rows_reference

RUNS = list(record_rows.runs())


def expected(run, *, lazy=None, squares_apart=None):
    """The tables and slots of a run's rule, or with another meaning of rows or of repeats."""
    rule = rows_reference.rule(run.framework, run.case.options)
    if squares_apart is not None:
        rule = rule._replace(squares_apart=squares_apart)
    batches = list(zip(run.indices, run.grads, strict=True))
    lazy = run.lazy if lazy is None else lazy
    return rows_reference.run(run.start, batches, run.rates, rule, lazy=lazy)


def named(run):
    """Which rows the batch of each step names, [step, row]."""
    return np.stack([np.isin(np.arange(record_rows.ROWS), rows) for rows in run.indices])


def test_each_is_its_rule(subtests):
    for run in RUNS:
        with subtests.test(run=run.name):
            tables, slots = expected(run)
            assert run.error(tables) <= run.tolerance
            for name, slot in run.slots.items():
                np.testing.assert_allclose(slots[name], slot, run.tolerance, 1e-14, err_msg=name)


def padded(run):
    """The batches in one size, filled up with the index of no row."""
    size = max(map(len, run.indices))
    indices = np.full((len(run.indices), size), len(run.start), np.int32)
    grads = np.ones((*indices.shape, run.start.shape[1]), run.start.dtype)
    for i, (at, g) in enumerate(zip(run.indices, run.grads, strict=True)):
        indices[i, : len(at)], grads[i, : len(at)] = at, g
    return indices, grads


@pytest.mark.parametrize("dtype", record_rows.DTYPES)
def test_ours_takes_the_steps_of_the_real_one(dtype, subtests):
    """Each dialect, lazy where its framework is; Keras 3 where no batch repeats a row."""
    mine = [run for run in RUNS if run.dtype == dtype and run.summed]
    assert {run.framework for run in mine if run.lazy} == {
        "tensorflow_v1",
        "sonnet",
        "keras_legacy",
    }
    assert {run.dialect for run in mine} == {"tensorflow_v1", "sonnet", "keras_legacy", "keras"}

    @jax.jit
    def paths(starts, batches):
        found = []
        for run, start, batch in zip(mine, starts, batches, strict=True):
            tx = frameworks.dialect(
                frameworks.Run(run.dialect, batch, run.start, run.rates, run.kwargs)
            )

            def step(carry, batch, tx=tx, lazy=run.lazy):
                table, state = rows.update(tx, *batch, *carry)
                whole = table if lazy else rows.settle(tx, table, state)[0]
                return (table, state), whole

            state = rows.init(tx, start, lazy=run.lazy)
            found.append(jax.lax.scan(step, (start, state), batch)[1])
        return found

    with jax.enable_x64(dtype == "float64"):
        tables = jax.device_get(paths([run.start for run in mine], list(map(padded, mine))))
    for run, found in zip(mine, tables, strict=True):
        with subtests.test(run=run.name):
            assert run.error(found) <= run.tolerance


def test_each_is_not_the_other_rule(subtests):
    """Lazy is told from dense, and repeats that add up from squares that do."""
    for run in RUNS:
        with subtests.test(run=run.name):
            assert run.error(expected(run, lazy=not run.lazy)[0]) > 1e-2
            repeats = any(len(set(rows)) < len(rows) for rows in run.indices)
            assert repeats != run.case.name.endswith(record_rows.APART)
            other = run.error(expected(run, squares_apart=run.summed)[0])
            assert other > 1e-2 if repeats else other <= run.tolerance


def test_what_moves(subtests):
    """To the bit: in lazy runs the rows of the batch; in dense ones, with momentum, all so far."""
    for run in RUNS:
        with subtests.test(run=run.name):
            before = np.concatenate([run.start[None], run.tables[:-1]])
            moved = (run.tables != before).any(-1)
            rows = named(run)
            if not run.lazy and run.case.options.get("momentum"):
                assert (moved == np.logical_or.accumulate(rows)).all()
            else:
                assert not (moved & ~rows).any()
                assert moved.sum() > 0.9 * rows.sum()  # not where the gradient is 0


def test_the_batches_are_of_every_kind(subtests):
    for run in RUNS:
        with subtests.test(run=run.name):
            rows = named(run)
            assert not rows[:, record_rows.NEVER].any()
            longest = np.diff(np.flatnonzero(rows[:, record_rows.RESTING])).max()
            assert longest > record_rows.STEPS / 2
            assert not rows[record_rows.EMPTY].any()
            if not run.case.name.endswith(record_rows.APART):
                assert rows[record_rows.SINGLE].sum() == 1
                total = np.zeros_like(run.start)
                step = record_rows.CANCELLING
                np.add.at(total, run.indices[step], run.grads[step])
                assert not total[[2, 4]].any()


def test_each_framework_has_both_rates_dtypes_and_every_option():
    for framework in record_rows.CASES:
        mine = [run for run in RUNS if run.framework == framework]
        assert {run.dtype for run in mine} == set(record_rows.DTYPES)
        assert {np.ptp(run.rates) > 0 for run in mine} == {True, False}
        options = {name for run in mine for name in run.kwargs}
        assert options >= {"epsilon", "momentum", "centered"}


def test_another_list_of_cases_is_noticed(monkeypatch):
    monkeypatch.setitem(record_rows.CASES, "sonnet", [cases.Case("another", {})])
    with pytest.raises(ValueError, match="has other cases"):
        list(record_rows.runs())
