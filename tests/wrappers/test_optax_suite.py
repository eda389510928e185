"""Optax's own tests of rmsprop and scale_by_rms, run on ours instead of theirs.

They come with the installed Optax. test_rms_match_adam is left out, because it compares with the
rounding error of 1 - decay^t in float32; test_equations shows that identity in float64.
"""

import importlib
import sys
import unittest
import warnings

import jax
import optax
from optax._src import alias, transform
import pytest

from rmsprop_jax import rmsprop, scale_by_rms

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Optax

MODULES = ("optax._src.alias_test", "optax._src.transform_test", "optax._src.float64_test")
MODULES += ("optax._src.sharding_test",)


def cases():
    """The cases that speak of RMSProp, from modules that are imported with ours in place."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about what else they import
        for module, name, ours in (
            (alias, "rmsprop", rmsprop),
            (optax, "rmsprop", rmsprop),
            (transform, "scale_by_rms", scale_by_rms),
            (optax, "scale_by_rms", scale_by_rms),
        ):
            patch.setattr(module, name, ours)
        for name in MODULES:
            sys.modules.pop(name, None)
            module = importlib.import_module(name)
            for suite in unittest.defaultTestLoader.loadTestsFromModule(module):
                for case in suite:
                    about = f"{case} {getattr(case, '_testMethodName', '')}"
                    if ("rmsprop" in about or "scale_by_rms" in about) and "adam" not in about:
                        yield name.rsplit(".", 1)[1], case


CASES = list(cases())


@pytest.mark.parametrize(
    "case",
    [case for _, case in CASES],
    ids=[f"{module}-{case._testMethodName}" for module, case in CASES],
)
def test_case(case, monkeypatch):
    monkeypatch.setattr(alias, "rmsprop", rmsprop)
    monkeypatch.setattr(transform, "scale_by_rms", scale_by_rms)
    # They compare versions as strings, by which 0.10 comes before 0.7.2, and would skip.
    monkeypatch.setattr(jax, "__version__", max(jax.__version__, "0.9", key=str))
    result = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.run(result)
    assert not result.errors, result.errors[0][1]
    assert not result.failures, result.failures[0][1]
    assert not result.skipped, result.skipped[0][1]
    assert result.testsRun == 1


def test_the_cases_are_there():
    """A renamed test of theirs would leave the list empty without a word."""
    assert len(CASES) >= 30, [str(case) for _, case in CASES]
