"""Our dialects compared with recorded runs of the frameworks they are named after.

tests/compare/record_dialects.py describes what is recorded, and the tolerances.
"""

import collections
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


@pytest.mark.parametrize("framework", RECORDS)
def test_equals_the_framework(framework, subtests):
    rows = record_dialects.compare(framework, RECORDS[framework], KEPT)
    varying = [case.name for case in cases.CASES[framework] if not case.constant]
    for dtype in record_dialects.DTYPES:
        assert [case.name for case, of, *_ in rows if of == dtype] == varying
    for case, dtype, error, tolerance in rows:
        with subtests.test(case=case.name, dtype=dtype):
            assert error <= tolerance


def test_is_right_where_the_framework_turns_to_nan(subtests):
    """Centered on constant gradients, where v - m^2 cancels, against the loop of reference.py."""
    constant = {
        framework: (i, case)
        for framework, listed in cases.CASES.items()
        for i, case in enumerate(listed)
        if case.constant
    }
    assert set(constant) == set(cases.CASES) - {"mlx", "jax_example"}  # which center nothing
    listed = [(framework, case) for framework, (_, case) in constant.items()]
    paths = record_dialects.ours(listed, "float32")
    tolerance = cases.TOLERANCE["float32"]
    for (framework, (i, case)), (got, start) in zip(constant.items(), paths, strict=True):
        with subtests.test(framework=framework):
            assert np.isnan(RECORDS[framework]["float32"][i, -1]).any()
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
            want = start + np.cumsum(steps, axis=0)
            assert cases.error(framework, case, start, got[KEPT], want[KEPT]) <= tolerance


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
RECIPES = {"keras": KERAS, "pytorch": PYTORCH}
FEATURES = {"keras": cases.KERAS_FEATURES, "pytorch": cases.PYTORCH_FEATURES}


def run(txs, options):
    """The parameters after the kept steps, and with use_ema their averages, {feature/name: path}.

    All transformations are in one program, and what is around them is in NumPy.
    """
    gradients, start = cases.tree_problem()
    xs, averages, found = dict.fromkeys(txs, start), {}, collections.defaultdict(list)
    states = {feature: tx.init(start) for feature, tx in txs.items()}

    @jax.jit
    def update(grads, states, xs):
        return {f: tx.update(grads[f], states[f], xs[f]) for f, tx in txs.items()}

    for t in range(cases.STEPS):
        now = {name: steps[t] for name, steps in gradients.items()}
        missing = now | {"bias": None} if cases.MISSING[t] else now
        both = update({f: missing if f == "None" else now for f in txs}, states, xs)
        states = {feature: state for feature, (_, state) in both.items()}
        for feature, (u, _) in jax.device_get(both).items():
            x = {name: x if u[name] is None else x + u[name] for name, x in xs[feature].items()}
            if options[feature].get("use_ema"):
                average = x if t == 0 else optax.incremental_update(x, averages[feature], 1 - 0.8)
                averages[feature] = average
                if (t + 1) % options[feature].get("ema_overwrite_frequency", cases.STEPS + 1) == 0:
                    x = average
                for name, value in average.items():
                    found[f"{feature}/average {name}"].append(value)
            for name, value in x.items():
                found[f"{feature}/{name}"].append(value)
            xs[feature] = x
    return {name: np.stack(path)[KEPT] for name, path in found.items()}


@pytest.mark.parametrize("framework", RECIPES)
def test_recipes_in_optax(framework, subtests, default_promotion):
    features = FEATURES[framework]
    with jax.enable_x64(True):
        paths = run({feature: recipe() for feature, recipe in RECIPES[framework].items()}, features)
    recorded = {n: p for n, p in RECORDS[framework].items() if n.split("/")[0] in features}
    assert set(paths) == set(recorded)
    for name, path in paths.items():
        with subtests.test(feature=name):
            np.testing.assert_allclose(path, recorded[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("framework", RECIPES)
def test_every_feature_shows_and_has_a_recipe(framework):
    listed = FEATURES[framework]
    assert set(RECIPES[framework]) == set(listed)
    for one, other in itertools.combinations(listed, 2):
        apart = [
            np.abs(RECORDS[framework][f"{one}/{name}"] - RECORDS[framework][f"{other}/{name}"])
            for name in cases.TREE
        ]
        assert max(map(np.max, apart)) > 1e-3, (one, other)


def test_complex_numbers_are_pairs_in_pytorch(subtests):
    gradients, start = cases.complex_problem()
    paths = frameworks.ours(
        [
            frameworks.Run("pytorch", gradients, start, cases.CONSTANT, options)
            for options in cases.COMPLEX.values()
        ]
    )
    for feature, path in zip(cases.COMPLEX, paths, strict=True):
        with subtests.test(feature=feature):
            want = RECORDS["pytorch"][f"{feature}/x"]
            assert path.dtype == want.dtype == np.complex128
            np.testing.assert_allclose(path[KEPT], want, rtol=1e-11, atol=1e-12)
