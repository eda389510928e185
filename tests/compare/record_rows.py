"""Records the frameworks' steps on the rows of a table, for tests/rows/test_recorded.py.

    python tests/compare/record_rows.py             # writes tests/fixtures/rows_tensorflow.npz
    python tests/compare/record_rows.py --check     # compares new runs with that file

The frameworks are those of TensorFlow; tests/rows_reference.py describes what they do. A gradient
is a tf.IndexedSlices: indices of rows, some of them repeated, and a gradient for each. The batches
include an empty one, one whose repeats cancel, and one with a single row. One row is not touched
for most of the run, and one is never touched. Keras treats repeats differently, so most of its
cases use the same gradients with rows that all differ.

The file contains the batches and the start; the table after every step of each case in float64 and
float32, [case, step, row, column]; the slots at the end in float64, [case, slot, row, column], NaN
where a case has none; the names of the cases; and the versions.
"""

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cases
from cases import Case
import frameworks

FIXTURE = Path(__file__).parents[1] / "fixtures" / "rows_tensorflow.npz"
PACKAGES = ("tensorflow", "tf_keras", "dm-sonnet", "keras")
DTYPES = ("float64", "float32")
SLOTS = ("rms", "mg", "momentum")

STEPS, ROWS, COLUMNS, BATCH = 20, 9, 3, 5
EMPTY, CANCELLING, SINGLE = 5, 8, 11  # steps
RESTING, NEVER = 7, 8  # rows; the others are drawn at random
CONSTANT, FALLING = np.full(STEPS, 0.1), cases.FALLING[:STEPS]


def _grid(decay, rounded=False):
    """What every framework is run with; decay is its name of that argument.

    rounded says whether it makes float32 of its defaults.
    """
    plain = {decay: 0.8, "epsilon": 1e-3}
    return [
        Case("defaults", {}, CONSTANT, rounded=rounded),
        Case("plain", plain, CONSTANT),
        Case("falling rate", plain, FALLING),
        Case("momentum", plain | {"momentum": 0.9}, FALLING),
        Case("centered", plain | {"centered": True}, CONSTANT),
        Case("centered, momentum", plain | {"momentum": 0.9, "centered": True}, FALLING),
    ]


APART = ", rows apart"  # ends the names of the cases in which no batch repeats a row
CASES = {
    "tensorflow_v1": _grid("decay", rounded=True),
    "sonnet": _grid("decay", rounded=True),
    "keras_legacy": _grid("rho", rounded=True),
    "tf_keras": _grid("rho"),
    "keras": [
        *(case._replace(name=case.name + APART) for case in _grid("rho")),
        *(case for case in _grid("rho") if case.name in ("plain", "momentum")),
    ],
}


class Run(NamedTuple):
    """A recorded run of a framework, and what is like it here."""

    framework: str
    case: Case
    dialect: str  # in rmsprop_jax.dialects
    kwargs: dict[str, Any]  # of the dialect, but for its learning_rate
    rates: np.ndarray  # the learning rate of each step
    lazy: bool  # whether only the rows of a batch make a step
    summed: bool  # whether repeated rows act as one with the sum of their gradients
    dtype: str
    start: np.ndarray
    indices: list[np.ndarray]  # of each step
    grads: list[np.ndarray]
    tables: np.ndarray  # after each step
    slots: dict[str, np.ndarray]  # after the last, in float64; of those that the framework has

    @property
    def name(self):
        return f"{self.framework}, {self.case.name}, {self.dtype}"

    @property
    def tolerance(self):
        return cases.tolerance(self.case, self.dtype)

    def error(self, tables):
        """Of other tables, in units of the way from the start plus one learning rate."""
        return cases.error(self.framework, self.case, self.start, tables, self.tables)


def is_lazy(framework, options):
    if framework == "keras_legacy":
        return options.get("momentum", 0) > 0
    return framework in ("tensorflow_v1", "sonnet")


def load():
    with np.load(FIXTURE) as file:
        return dict(file)


def runs(record=None):
    """Those of a record, by default of the file."""
    record = load() if record is None else record
    if list(record["cases"]) != [f"{of}, {case.name}" for of, case in _listed()]:
        raise ValueError(f"{FIXTURE.name} has other cases: run tests/compare/record_rows.py")
    for i, (framework, case) in enumerate(_listed()):
        slots = dict(zip(SLOTS, record["slots"][i], strict=True))
        for dtype in DTYPES:
            indices, grads = _batches(record, case, dtype)
            yield Run(
                framework,
                case,
                dialect="keras" if framework == "tf_keras" else framework,
                kwargs=case.options,
                rates=case.rates,
                lazy=is_lazy(framework, case.options),
                summed=framework != "keras" or case.name.endswith(APART),
                dtype=dtype,
                start=record["start"].astype(dtype),
                indices=indices,
                grads=grads,
                tables=record[dtype][i],
                slots={name: slot for name, slot in slots.items() if np.isfinite(slot).all()},
            )


def _listed():
    return [(framework, case) for framework, of in CASES.items() for case in of]


def _batches(record, case, dtype):
    """The indices and the gradients of every step."""
    indices = record["apart" if case.name.endswith(APART) else "indices"]
    sizes = record["sizes"]
    rows = [of[:size] for of, size in zip(indices, sizes, strict=True)]
    grads = [of[:size].astype(dtype) for of, size in zip(record["grads"], sizes, strict=True)]
    return rows, grads


def problem():
    """The batches, and a start of ten learning rates in size. All numbers are float32."""
    rng = np.random.default_rng(0)
    indices = rng.integers(RESTING, size=(STEPS, BATCH), dtype=np.int32)
    apart = np.stack([rng.permutation(RESTING)[:BATCH] for _ in range(STEPS)]).astype(np.int32)
    for rows in (indices, apart):
        rows[[1, STEPS - 2], 0] = RESTING
    grads = rng.standard_normal((STEPS, BATCH, COLUMNS)) * [0.03, 1.0, 30.0]
    grads[rng.random(grads.shape) < 0.1] = 0
    indices[CANCELLING] = [2, 4, 2, 4, 6]
    grads[CANCELLING, 2:4] = -grads[CANCELLING, :2]
    indices[SINGLE] = 3
    sizes = np.full(STEPS, BATCH)
    sizes[EMPTY] = 0
    return {
        "indices": indices,
        "apart": apart,
        "grads": grads.astype(np.float32),
        "sizes": sizes,
        "start": rng.standard_normal((ROWS, COLUMNS)).astype(np.float32),
    }


# Each is an optimizer of x as two functions: apply(gradient, learning rate), and the slots.


def _tensorflow_v1(x, options):
    """tf.compat.v1.train.RMSPropOptimizer; the learning rate is a callable"""
    import tensorflow as tf

    rate = tf.Variable(0.0, dtype=x.dtype)
    options = frameworks.tensors(options, x.dtype, {"centered"})
    optimizer = tf.compat.v1.train.RMSPropOptimizer(rate.read_value, **options)
    return _with_apply_gradients(optimizer, x, rate)


def _keras_legacy(x, options):
    """tf_keras.optimizers.legacy.RMSprop; the learning rate is a callable"""
    import tensorflow as tf
    import tf_keras

    rate = tf.Variable(0.0, dtype=x.dtype)
    options = frameworks.tensors(options, x.dtype, {"centered", "epsilon"})
    optimizer = tf_keras.optimizers.legacy.RMSprop(rate.read_value, **options)
    return _with_apply_gradients(optimizer, x, rate)


def _with_apply_gradients(optimizer, x, rate):
    def apply(gradient, value):
        rate.assign(value)
        optimizer.apply_gradients([(gradient, x)])

    def slots():
        return {name: optimizer.get_slot(x, name).numpy() for name in optimizer.get_slot_names()}

    return apply, slots


def _sonnet(x, options):
    """sonnet.optimizers.RMSProp; the learning rate is a tf.Variable"""
    import sonnet
    import tensorflow as tf

    rate = tf.Variable(0.0, dtype=x.dtype)
    options = frameworks.tensors(options, x.dtype, {"centered"})
    optimizer = sonnet.optimizers.RMSProp(rate, **options)

    def apply(gradient, value):
        rate.assign(value)
        optimizer.apply([gradient], [x])

    return apply, lambda: _first(rms=optimizer.ms, mg=optimizer.mg, momentum=optimizer.mom)


def _tf_keras(x, options):
    """tf_keras.optimizers.RMSprop, which is not the legacy one; its learning rate is assigned"""
    import tf_keras

    tf_keras.backend.set_floatx(x.dtype.name)
    return _with_assigned_rate(tf_keras.optimizers.RMSprop(**options), x)


def _keras(x, options):
    """keras.optimizers.RMSprop of Keras 3, on TensorFlow; its learning rate is assigned"""
    import keras

    assert keras.backend.backend() == "tensorflow"
    keras.config.set_floatx(x.dtype.name)
    return _with_assigned_rate(keras.optimizers.RMSprop(**options), x)


def _with_assigned_rate(optimizer, x):
    def apply(gradient, value):
        optimizer.learning_rate.assign(value)
        optimizer.apply_gradients([(gradient, x)])

    return apply, lambda: _first(
        rms=optimizer._velocities,
        mg=optimizer._average_gradients,
        momentum=optimizer._momentums,
    )


def _first(**slots):
    return {name: of[0].numpy() for name, of in slots.items() if of}


OPTIMIZERS = {
    "tensorflow_v1": _tensorflow_v1,
    "sonnet": _sonnet,
    "keras_legacy": _keras_legacy,
    "tf_keras": _tf_keras,
    "keras": _keras,
}


def run_all(given):
    """All cases on given batches, as a record."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    record = given | {
        "cases": np.array([f"{framework}, {case.name}" for framework, case in _listed()]),
        "versions": np.array([f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]),
    }
    for dtype in DTYPES:
        paths, ends = [], []
        for framework, case in _listed():
            x = tf.Variable(given["start"].astype(dtype))
            apply, slots = OPTIMIZERS[framework](x, case.options)
            path = []
            for rows, grads, rate in zip(*_batches(given, case, dtype), case.rates, strict=True):
                shape = tf.constant(x.shape, tf.int32)
                apply(tf.IndexedSlices(tf.constant(grads), tf.constant(rows), shape), rate)
                path.append(x.numpy())
            paths.append(np.stack(path))
            absent = np.full(x.shape, np.nan)
            ends.append([slots().get(name, absent) for name in SLOTS])
        record[dtype] = np.stack(paths)
        assert record[dtype].dtype == dtype
        if dtype == "float64":
            record["slots"] = np.array(ends)
    return record


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    if not parser.parse_args(argv).check:
        record = run_all(problem())
        np.savez_compressed(FIXTURE, **record)
        print(f"{FIXTURE.stat().st_size / 1000:.0f} kB in {FIXTURE}")
        return
    recorded = load()
    given = {name: recorded[name] for name in problem()}
    for live, of in zip(runs(run_all(given)), runs(recorded), strict=True):
        error = of.error(live.tables)
        assert error <= cases.TOLERANCE[of.dtype], (of.name, error)
        assert live.slots.keys() == of.slots.keys(), of.name
        for name, slot in of.slots.items():
            np.testing.assert_allclose(live.slots[name], slot, 1e-11, 1e-15, err_msg=of.name)
    print("agrees with", FIXTURE, "of", *recorded["versions"])


if __name__ == "__main__":
    main()
