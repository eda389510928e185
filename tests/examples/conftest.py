"""The settings of all tests of examples."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_them():
    """With JAX's own promotion, which no example asks for another."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
