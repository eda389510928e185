"""The compilation cache that conftest.py configures: where it is kept, and that it is safe."""

import os
from pathlib import Path
import re
import subprocess
import sys
import tomllib

import jax
import jaxlib
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def conftest(pytestconfig):
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not in a virtual environment")
def test_the_cache_lies_in_the_environment_that_the_tests_run_in(conftest):
    assert conftest.CACHE.is_relative_to(sys.prefix)
    assert jax.config.jax_compilation_cache_dir == str(conftest.CACHE)


def test_other_flags_and_versions_have_a_cache_of_their_own(conftest, monkeypatch):
    folder = conftest.compilation_cache
    folders = [folder()]
    for name in ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "another")
            folders.append(folder())
    for package in (jax, jaxlib):
        with monkeypatch.context() as patch:
            patch.setattr(package, "__version__", "0.0.1")
            folders.append(folder())
    assert len(set(folders)) == 6
    assert folder() == folders[0]


# Prints how often it was read from the cache, and how often compiled, after each of three calls.
PROGRAM = """
import pathlib, sys, warnings
import jax
import numpy as np

seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.split("/")[-1]))
triple = jax.jit(lambda x: 3 * x)

def call():
    assert float(triple(np.float32(2))) == 6
    print(seen.count("cache_hits"), seen.count("cache_misses"))
    jax.clear_caches()

call()
call()
for file in pathlib.Path(sys.argv[1]).iterdir():
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    call()
print(*(warning.message for warning in caught))
"""


def test_a_program_is_read_back_and_one_that_was_half_written_is_compiled_again(tmp_path):
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env=os.environ | settings,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *calls, warning = ran.stdout.splitlines()
    assert calls == ["0 1", "1 1", "1 2"]
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    _, ignored = pyproject["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert re.match(ignored.removeprefix("ignore:"), warning)
