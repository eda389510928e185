"""Our dialects against recorded runs of the frameworks that they are named after.

tests/compare/record_dialects.py says what is recorded and what the tolerances are.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import frameworks
import record_dialects
import reference
from rmsprop_jax import dialects

RECORDS = {framework: record_dialects.load(framework) for framework in cases.CASES}
KEPT = record_dialects.KEPT
EVERY = [
    pytest.param(framework, i, id=f"{framework}-{case.name}")
    for framework, listed in cases.CASES.items()
    for i, case in enumerate(listed)
]
CONSTANT = [
    (framework, i)
    for framework, listed in cases.CASES.items()
    for i, case in enumerate(listed)
    if case.constant
]


def ours(framework, case, dtype):
    """The recorded steps of our dialect in a case, and the start."""
    gradients, start = cases.problem(framework, case, np.dtype(dtype))
    path = frameworks.ours(framework, gradients, start, case.rates, case.options)
    assert path.dtype == dtype
    return path[KEPT], start


@pytest.mark.parametrize(("framework", "i"), [p for p in EVERY if tuple(p.values) not in CONSTANT])
def test_equals_the_framework(framework, i):
    case, record = cases.CASES[framework][i], RECORDS[framework]
    for dtype in record_dialects.DTYPES:
        got, start = ours(framework, case, dtype)
        want = record["float64" if case.centered else dtype][i]
        error = cases.error(framework, case, start, got, want)
        assert error <= cases.tolerance(case, dtype), dtype


@pytest.mark.parametrize(("framework", "i"), CONSTANT, ids=[framework for framework, _ in CONSTANT])
def test_is_right_where_the_framework_turns_to_nan(framework, i):
    """Centered on constant gradients, where v - m^2 cancels, against the loop of reference.py."""
    case, record = cases.CASES[framework][i], RECORDS[framework]
    assert np.isnan(record["float32"][i, -1]).any()
    gradients, _ = cases.problem(framework, case, np.float32)
    from_1 = framework in ("tensorflow_v1", "timm", "stable_baselines3")
    outside = framework in ("pytorch", "keras_legacy")
    steps = reference.run(
        gradients,
        learning_rate=cases.CONSTANT,
        decay=0.5,
        eps=1.0 if outside else 1e-4,
        centered=True,
        initial_scale=float(from_1),
        eps_in_sqrt=not outside,
    )
    got, start = ours(framework, case, "float32")
    want = (start + np.cumsum(steps, axis=0))[KEPT]
    assert cases.error(framework, case, start, got, want) <= cases.TOLERANCE["float32"]


@pytest.mark.parametrize("framework", RECORDS)
def test_every_case_shows(framework):
    """None is another in disguise, but for the defaults and what the framework ignores."""
    listed, paths = cases.CASES[framework], RECORDS[framework]["float64"]
    for i, case in enumerate(listed[1:], 1):
        _, start = cases.problem(framework, case, np.float64)
        same = {
            other.ignored or other.name
            for other, path in zip(listed[1:], paths[1:], strict=True)
            if cases.error(framework, case, start, paths[i], path) < 1e-3
        }
        assert same == {case.ignored or case.name}


@pytest.mark.parametrize("framework", RECORDS)
def test_the_docstring_names_the_version_that_was_compared(framework):
    version = re.search(r" (\d+\.\d+)", str(RECORDS[framework]["version"]))[1]
    assert re.search(rf"\b{re.escape(version)}\b", getattr(dialects, framework).__doc__)


def test_other_gradients_are_noticed(monkeypatch):
    monkeypatch.setattr(cases, "checksum", lambda: "another")
    with pytest.raises(ValueError, match="recorded from other gradients"):
        record_dialects.load("mlx")


# What frameworks have around their rule, and the recipe in Optax for each.


def falling(count):
    return jnp.asarray(cases.FALLING)[count]


def keras(rate=falling, **options):
    return dialects.keras(rate, **(cases.KERAS_BASE | options))


def pytorch(lr=0.1, **options):
    return dialects.pytorch(lr, **(cases.PYTORCH_BASE | options))


def clip_each(c):
    """Keras's clipnorm: the norm of each variable's gradient is at most c."""
    return optax.stateless_with_tree_map(lambda g, _: optax.projections.projection_l2_ball(g, c))


KERAS = {
    "clipnorm": lambda: optax.chain(clip_each(1.0), keras()),
    "clipvalue": lambda: optax.chain(optax.clip(0.5), keras()),
    "global_clipnorm": lambda: optax.chain(optax.clip_by_global_norm(1.0), keras()),
    "use_ema": keras,
    "use_ema, overwriting": keras,
    # Keras counts its schedule's steps in small batches, MultiSteps in updates.
    "gradient_accumulation_steps": lambda: optax.MultiSteps(
        optax.chain(optax.clip(0.5), keras(lambda count: falling(4 * count + 3))),
        4,
        accumulator_dtype=jnp.float64,
    ),
    "exclude_from_weight_decay": lambda: optax.partition(
        {"decayed": keras(), "not": keras(weight_decay=None)}, {"kernel": "decayed", "bias": "not"}
    ),
    # At a boundary itself Keras has still the value before it.
    "PiecewiseConstantDecay": lambda: keras(
        optax.piecewise_constant_schedule(
            cases.PIECES["values"][0],
            {
                boundary + 1: after / before
                for boundary, (before, after) in zip(
                    cases.PIECES["boundaries"],
                    itertools.pairwise(cases.PIECES["values"]),
                    strict=True,
                )
            },
        )
    ),
    "None": keras,
}
PYTORCH = {
    "maximize": lambda: pytorch(maximize=True),
    "parameter groups": lambda: optax.partition(
        {name: pytorch(**options) for name, options in cases.PYTORCH_GROUPS.items()},
        {"kernel": "kernel", "bias": "bias"},
    ),
    "None": pytorch,
}


def run(tx, feature, options):
    """The parameters after the kept steps, and with use_ema their averages, {name: path}."""
    gradients, x = cases.tree_problem()
    found = {name: [] for name in x}
    averages = {f"average {name}": [] for name in x} if options.get("use_ema") else {}
    state, average, update = tx.init(jax.tree.map(jnp.asarray, x)), None, jax.jit(tx.update)
    for t in range(cases.STEPS):
        grads = {name: jnp.asarray(steps[t]) for name, steps in gradients.items()}
        if feature == "None" and cases.MISSING[t]:
            grads["bias"] = None
        updates, state = update(grads, state, x)
        x = {name: x[name] if u is None else x[name] + u for name, u in updates.items()}
        if averages:
            average = x if t == 0 else optax.incremental_update(x, average, 1 - 0.8)
            if (t + 1) % options.get("ema_overwrite_frequency", cases.STEPS + 1) == 0:
                x = average
            for name in x:
                averages[f"average {name}"].append(average[name])
        for name in x:
            found[name].append(x[name])
    return {name: np.stack(path)[KEPT] for name, path in (found | averages).items()}


@pytest.mark.parametrize(
    ("framework", "feature", "recipe"),
    [
        pytest.param(framework, feature, recipe, id=f"{framework}-{feature}")
        for framework, recipes in {"keras": KERAS, "pytorch": PYTORCH}.items()
        for feature, recipe in recipes.items()
    ],
)
def test_recipe_in_optax(framework, feature, recipe):
    options = cases.KERAS_FEATURES[feature] if framework == "keras" else {}
    with jax.enable_x64(True):
        paths = run(recipe(), feature, options)
    recorded = {
        name.removeprefix(f"{feature}/"): path
        for name, path in RECORDS[framework].items()
        if name.startswith(f"{feature}/")
    }
    assert set(paths) == set(recorded)
    for name, path in paths.items():
        np.testing.assert_allclose(path, recorded[name], rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("framework", "recipes"), [("keras", KERAS), ("pytorch", PYTORCH)])
def test_every_feature_shows_and_has_a_recipe(framework, recipes):
    listed = {"keras": cases.KERAS_FEATURES, "pytorch": cases.PYTORCH_FEATURES}[framework]
    assert set(recipes) == set(listed)
    for one, other in itertools.combinations(listed, 2):
        apart = [
            np.abs(RECORDS[framework][f"{one}/{name}"] - RECORDS[framework][f"{other}/{name}"])
            for name in cases.TREE
        ]
        assert max(map(np.max, apart)) > 1e-3, (one, other)


@pytest.mark.parametrize("feature", cases.COMPLEX)
def test_complex_numbers_are_pairs_in_pytorch(feature):
    gradients, start = cases.complex_problem()
    with jax.enable_x64(True):
        options = cases.COMPLEX[feature]
        path = frameworks.ours("pytorch", gradients, start, cases.CONSTANT, options)
    want = RECORDS["pytorch"][f"{feature}/x"]
    assert path.dtype == want.dtype == np.complex128
    np.testing.assert_allclose(path[KEPT], want, rtol=1e-11, atol=1e-12)
