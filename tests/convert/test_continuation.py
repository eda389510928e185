"""Runs that another framework begins and we end, against recorded checkpoints of the framework.

tests/compare/record_convert.py says what is recorded, and ends what we begin: that needs the
frameworks themselves.
"""

from typing import Any, NamedTuple

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
from checkpoint_cases import CASES, error, problem, theirs
import checkpoints
import flax_models
import models
import record_convert
from rmsprop_jax import convert, dialects
from rmsprop_jax._leaves import leaf_name

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


# Whole models.


class Model(NamedTuple):
    """A model in Flax: apply(params, stats, x, train) gives its outputs."""

    params: Any
    stats: Any
    apply: Any
    mapping: dict[str, convert.Leaf]


def linen_model(name, framework, cell):
    epsilon = flax_models.EPSILON[framework]
    build = getattr(flax_models, f"Linen{name.capitalize()}")
    model = build(epsilon, cell) if cell else build(epsilon)
    x, _ = models.batch(name)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, False))

    def apply(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, train, mutable=["batch_stats"])[0]

    cells = [(f"cell{i}", "linen") for i in range(2)]
    mapping = mapping_of(name, framework, cells)
    return Model(variables["params"], variables.get("batch_stats", {}), apply, mapping)


def nnx_model(name, framework, cell):
    build = getattr(flax_models, f"Nnx{name.capitalize()}")
    rest = {"cell": cell} if cell else {}
    some = nnx.Param, nnx.BatchStat, ...

    def split():
        return nnx.split(build(flax_models.EPSILON[framework], rngs=nnx.Rngs(0), **rest), *some)

    graph, params, stats, _ = jax.eval_shape(split)
    others = jax.jit(lambda: split()[-1])()  # keys of random numbers

    def apply(params, stats, x, train):
        stats = jax.tree.map(lambda a: a, stats)  # variables of this trace
        return nnx.merge(graph, params, stats, others)(x, train)

    kind = "nnx_optimized" if cell is nnx.OptimizedLSTMCell else "nnx"
    mapping = mapping_of(name, framework, [(f"cells/{i}", kind) for i in range(2)])
    return Model(params, stats, apply, mapping)


def mapping_of(name, framework, cells):
    """By the ready-made mappings, one a layer."""
    if framework == "pytorch":
        lstms = [convert.torch_lstm(p, "lstm", c, layer=i) for i, (p, c) in enumerate(cells)]
        return {
            "cnn": convert.torch_conv("conv", "conv", bias=False)
            | convert.torch_norm("norm", "norm")
            | convert.torch_dense_after_conv("fc", "fc", models.FLAT),
            "sequence": convert.torch_embedding("embed", "embed")
            | convert.torch_norm("norm", "norm")
            | lstms[0]
            | lstms[1]
            | convert.torch_dense("fc", "fc"),
            "volume": convert.torch_conv("conv", "conv", dims=3)
            | convert.torch_norm("norm", "norm")
            | convert.torch_conv("line", "line", dims=1, bias=False),
        }[name]
    names = ("net/lstm/lstm_cell", "net/lstm_1/lstm_cell")
    lstms = [convert.keras_lstm(p, n, c) for n, (p, c) in zip(names, cells, strict=True)]
    return {
        "cnn": convert.keras_conv("conv", "net/conv", bias=False)
        | convert.keras_norm("norm", "net/norm")
        | convert.keras_dense("fc", "net/fc"),
        "sequence": convert.keras_embedding("embed", "net/embed")
        | convert.keras_norm("norm", "net/norm")
        | lstms[0]
        | lstms[1]
        | convert.keras_dense("fc", "net/fc"),
        "volume": convert.keras_conv("conv", "conv")
        | convert.keras_norm("norm", "norm")
        | convert.keras_conv("line", "line", bias=False),
    }[name]


def model_of(name, framework, flax, cell):
    """In float64, and with numbers that are not the framework's."""
    model = {"linen": linen_model, "nnx": nnx_model}[flax](name, framework, cell)
    params, stats = (
        jax.tree.map(lambda a: jnp.full(a.shape, 7.0), tree) for tree in (model.params, model.stats)
    )
    return model._replace(params=params, stats=stats)


EVERY_MODEL = [
    pytest.param(name, framework, flax, cell, id="-".join([name, framework, flax, *which]))
    for framework in models.RUN
    for name in models.NAMES
    for flax, cells in (
        ("linen", (linen.LSTMCell, linen.OptimizedLSTMCell)),
        ("nnx", (nnx.LSTMCell, nnx.OptimizedLSTMCell)),
    )
    for cell, which in ([(c, [c.__name__]) for c in cells] if name == "sequence" else [(None, [])])
]


@pytest.mark.parametrize(("name", "framework", "flax", "cell"), EVERY_MODEL)
def test_models(name, framework, flax, cell, default_promotion):
    """The same outputs, gradients and, from a checkpoint on, training, in float64."""
    record = RECORDS[framework]["models"][name]
    tolerance = cases.TOLERANCE["float32" if framework == "keras" else "float64"]

    def close(got, want):
        np.testing.assert_allclose(got, want, tolerance, 0.01 * tolerance)

    x, y = models.batch(name)
    with jax.enable_x64(True):
        model = model_of(name, framework, flax, cell)
        stats = convert.params_from(record["stats"], model.stats, stats_mapping(name, framework))
        tx, state, params = begin(framework, name, model, record)

        def loss(params):
            outputs = model.apply(params, stats, x, True)
            return jnp.mean((outputs - y) ** 2), outputs

        @jax.jit
        def step(params, state):
            gradients, outputs = jax.grad(loss, has_aux=True)(params)
            if model.stats:  # else the same
                outputs = model.apply(params, stats, x, False)
            updates, state = tx.update(gradients, state)
            return (optax.apply_updates(params, updates), state), gradients, outputs

        start = convert.params_from(record["start"], model.params, model.mapping)
        _, gradients, outputs = step(start, state)
        close(outputs, record["outputs"])
        gradients = convert.params_to(gradients, model.mapping)
        for path, want in record["gradients"].items():
            # A sum of two parameters has the gradient of each, which is not to be shared out.
            close(gradients[path] * (2 if "lstm.bias" in path else 1), want)
        for _ in range(models.K):
            (params, state), *_ = step(params, state)
        end = convert.params_from(record["final"], model.params, model.mapping)
        jax.tree.map(close, params, end)


def begin(framework, name, model, record):
    """Our transformation, state and parameters at the framework's checkpoint."""
    options = models.OPTIONS[name]
    params = convert.params_from(record["params"], model.params, model.mapping)
    names = list(record["start"])
    if framework == "keras":
        tx = dialects.keras(0.01, **options)
        state = convert.from_keras(record["checkpoint"], params, model.mapping, tx, names=names)
        return tx, state, params
    tx = dialects.pytorch(0.01, 0.9, **options)
    if name == "sequence":  # PyTorch moves both of its biases
        twice = {path for path, leaf in model.mapping.items() if leaf.also}
        mask = jax.tree_util.tree_map_with_path(lambda p, _: leaf_name(p) in twice, params)
        assert sum(jax.tree.leaves(mask)) == len(twice) in (2, 8)
        tx = optax.chain(tx, optax.masked(optax.scale(2.0), mask))
    state = convert.from_pytorch(record["checkpoint"], params, model.mapping, tx, names=names)
    return tx, state, params


def stats_mapping(name, framework):
    if name != "cnn":
        return {}
    if framework == "pytorch":
        return convert.torch_norm_stats("norm", "norm")
    return convert.keras_norm_stats("norm", "net/norm")
