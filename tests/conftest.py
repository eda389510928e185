"""The settings of every test: eight devices, strict promotion, and a compilation cache."""

import hashlib
import os
from pathlib import Path
import sys

# Those that do not ask for all eight use the first. On few cores, many devices wait for each
# other in threads: more of them than there are cores.
os.environ.setdefault("NPROC", "32")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import jaxlib
import pytest

# As in the strictest of our users' programs: neither dtypes nor ranks are mixed unasked.
STRICT = {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"}


def compilation_cache():
    """A folder of this virtual environment, for these versions and what they are run with."""
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES")]
    run_with = hashlib.sha256("\n".join(flags).encode()).hexdigest()[:8]
    name = f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{run_with}"
    return Path(sys.prefix, "compilation-cache", name)


for setting, value in STRICT.items():
    jax.config.update(setting, value)
if sys.prefix != sys.base_prefix:  # else the folder would be the system's
    CACHE = compilation_cache()
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def default_promotion():
    """JAX's own promotion, for what is others' and needs it."""
    strict = {setting: getattr(jax.config, setting) for setting in STRICT}
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    for setting, value in strict.items():
        jax.config.update(setting, value)
