"""Whole models converted by the ready-made mappings, compared with recorded runs of the frameworks.

tests/compare/models.py defines the models, and tests/flax_models.py their counterparts in Flax.
"""

from typing import Any, NamedTuple

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import flax_models
import models
import record_convert
from rmsprop_jax import convert, dialects
from rmsprop_jax._leaves import leaf_name

RECORDS = {framework: record_convert.load(framework) for framework in models.RUN}
BUILD = {"gru": "Sequence"}
CELLS = {
    ("sequence", "linen"): (linen.LSTMCell, linen.OptimizedLSTMCell),
    ("sequence", "nnx"): (nnx.LSTMCell, nnx.OptimizedLSTMCell),
    ("gru", "linen"): (linen.GRUCell,),
    ("gru", "nnx"): (flax_models.GRUCellWithBias,),
}


class Model(NamedTuple):
    """A model in Flax: apply(params, stats, x, train) gives its outputs."""

    params: Any
    stats: Any
    apply: Any
    mapping: dict[str, convert.Leaf]


def linen_model(name, framework, cell):
    epsilon = flax_models.EPSILON[framework]
    build = getattr(flax_models, f"Linen{BUILD.get(name, name.capitalize())}")
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
    build = getattr(flax_models, f"Nnx{BUILD.get(name, name.capitalize())}")
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
    if name in ("sequence", "gru"):
        return sequence_mapping("lstm" if name == "sequence" else "gru", framework, cells)
    if framework == "pytorch":
        features = models.HEADS * models.SIZE
        return {
            "cnn": convert.torch_conv("conv", "conv", bias=False)
            | convert.torch_norm("norm", "norm")
            | convert.torch_dense_after_conv("fc", "fc", models.FLAT),
            "volume": convert.torch_conv("conv", "conv", dims=3)
            | convert.torch_norm("norm", "norm")
            | convert.torch_conv("line", "line", dims=1, bias=False),
            "attention": convert.torch_embedding("embed", "embed")
            | convert.torch_attention("first", "first", features)
            | convert.torch_attention("second", "second", features, bias=False)
            | convert.torch_dense("fc", "fc"),
        }[name]
    return {
        "cnn": convert.keras_conv("conv", "net/conv", bias=False)
        | convert.keras_norm("norm", "net/norm")
        | convert.keras_dense("fc", "net/fc"),
        "volume": convert.keras_conv("conv", "conv")
        | convert.keras_norm("norm", "norm")
        | convert.keras_conv("line", "line", bias=False),
        "attention": convert.keras_embedding("embed", "embed")
        | convert.keras_attention("first", "first")
        | convert.keras_attention("second", "second", bias=False)
        | convert.keras_dense("fc", "fc"),
    }[name]


def sequence_mapping(layer, framework, cells):
    """Of a model with two cells of an LSTM or a GRU."""
    if framework == "pytorch":
        recurrent = getattr(convert, f"torch_{layer}")
        first, second = (recurrent(p, layer, c, layer=i) for i, (p, c) in enumerate(cells))
        rest = (
            convert.torch_embedding("embed", "embed")
            | convert.torch_norm("norm", "norm")
            | convert.torch_dense("fc", "fc")
        )
    else:
        recurrent = getattr(convert, f"keras_{layer}")
        names = (f"net/{layer}/{layer}_cell", f"net/{layer}_1/{layer}_cell")
        first, second = (recurrent(p, n, c) for n, (p, c) in zip(names, cells, strict=True))
        rest = (
            convert.keras_embedding("embed", "net/embed")
            | convert.keras_norm("norm", "net/norm")
            | convert.keras_dense("fc", "net/fc")
        )
    return rest | first | second


def model_of(name, framework, flax, cell):
    """In float64, and with numbers that are not the framework's."""
    model = {"linen": linen_model, "nnx": nnx_model}[flax](name, framework, cell)
    params, stats = (
        jax.tree.map(lambda a: jnp.full(a.shape, 7.0), tree) for tree in (model.params, model.stats)
    )
    return model._replace(params=params, stats=stats)


EVERY_MODEL = [
    pytest.param(
        name,
        framework,
        flax,
        cell,
        id="-".join([name, framework, flax, *([cell.__name__] if cell else [])]),
    )
    for framework in models.RUN
    for name in models.NAMES
    for flax in ("linen", "nnx")
    for cell in CELLS.get((name, flax), (None,))
    if (framework, cell) != ("keras", flax_models.GRUCellWithBias)  # there is no mapping
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
        # A sum of two parameters has the gradient of each, which is not to be shared out.
        gradients = jax.tree_util.tree_map_with_path(
            lambda path, g: g * len(model.mapping[leaf_name(path)].terms()), gradients
        )
        gradients = convert.params_to(gradients, model.mapping)
        assert set(gradients) == set(record["gradients"])
        for path, want in record["gradients"].items():
            close(gradients[path], want)
        for _ in range(models.K):
            (params, state), *_ = step(params, state)
        end = convert.params_from(record["final"], model.params, model.mapping)
        jax.tree.map(close, params, end)


def begin(framework, name, model, record):
    """Our transformation, state and parameters at the framework's checkpoint."""
    options = models.options(framework, name)
    params = convert.params_from(record["params"], model.params, model.mapping)
    names = list(record["start"])
    keras = framework == "keras"
    tx = dialects.keras(0.01, **options) if keras else dialects.pytorch(0.01, 0.9, **options)
    twice = {path for path, leaf in model.mapping.items() if leaf.also}
    if twice:  # the framework moves both of the biases that are added there
        mask = jax.tree_util.tree_map_with_path(lambda p, _: leaf_name(p) in twice, params)
        assert sum(jax.tree.leaves(mask)) == len(twice)
        tx = optax.chain(tx, optax.masked(optax.scale(2.0), mask))
    convert_from = convert.from_keras if keras else convert.from_pytorch
    return tx, convert_from(record["checkpoint"], params, model.mapping, tx, names=names), params


def stats_mapping(name, framework):
    if name != "cnn":
        return {}
    if framework == "pytorch":
        return convert.torch_norm_stats("norm", "norm")
    return convert.keras_norm_stats("norm", "net/norm")
