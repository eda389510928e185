"""What is shipped: the wheel in a clean environment, the version, the order of imports."""

import ast
import os
from pathlib import Path
import subprocess
import sys
import zipfile

import hatchling.build
import pytest

import rmsprop_jax

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "rmsprop_jax").rglob("*.py"))


def assert_has_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {str(source.relative_to(ROOT)) for source in SOURCES} <= {*names}
    assert "rmsprop_jax/py.typed" in names
    assert {n.split("/")[0] for n in names} == {
        "rmsprop_jax",
        f"rmsprop_jax-{rmsprop_jax.__version__}.dist-info",
    }


def test_the_wheel_has_the_package_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert_has_the_package_alone(tmp_path / hatchling.build.build_wheel(str(tmp_path)))


@pytest.mark.slow
def test_the_wheel_installs_and_imports_in_a_clean_environment(tmp_path):
    """Its dependencies are lent by the environment of the tests, so that no index is asked."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert_has_the_package_alone(wheel)

    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", clean], check=True)
    python = clean / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True)
    lent = next(p for p in sys.path if p.endswith("site-packages"))
    check = """
import importlib.metadata, importlib.resources, pathlib, sys
import rmsprop_jax
package = pathlib.Path(rmsprop_jax.__file__).parent
assert str(package).startswith(sys.argv[1]), package
assert (package / "py.typed").is_file()
assert importlib.metadata.version("rmsprop-jax") == rmsprop_jax.__version__
rmsprop_jax.rmsprop(0.1).init(1.0)
"""
    # Behind the clean environment's own folder, and without the editable install's hooks.
    finished = subprocess.run(
        [python, "-c", f"import sys; sys.path.append({lent!r})\n{check}", clean.resolve()],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


ORDER = [
    "_types",
    "_schedule",
    "_asking",
    "_transformation",
    "_arrays",
    "_mapped",
    "_storage",
    "_equations",
    "_leaves",
    "_gradients",
    "_checks",
    "_rule",
    "_rmsprop",
    "_describe",
    "low_memory._random",
    "low_memory._bfloat16",
    "low_memory._eight_bit",
    "low_memory._joined",
    "low_memory._storages",
    "low_memory._parts",
    "low_memory._master_weights",
    "low_memory._join_weights",
    "low_memory",
    "rows._missed",
    "rows._touched",
    "rows._state",
    "rows._steps",
    "rows._rows",
    "rows",
    "sharding._arguments",
    "sharding._division",
    "sharding._owners",
    "sharding._placement",
    "sharding._fsdp",
    "sharding._zero1",
    "sharding._beyond",
    "sharding._zero1_mapped",
    "sharding._state",
    "sharding._report",
    "sharding",
    "_diagnostics._states",
    "_diagnostics._quantiles",
    "_diagnostics._tally",
    "_diagnostics._diagnostics",
    "_diagnostics",
    "dialects._arguments",
    "dialects._others",
    "dialects._tensorflow",
    "dialects._torch",
    "dialects",
    "recipes._arguments",
    "recipes._pytorch",
    "recipes._reinforcement",
    "recipes._vision",
    "recipes",
    "convert._arrays",
    "convert._mapping",
    "convert._names",
    "convert._foreign",
    "convert._counts",
    "convert._attention",
    "convert._layers",
    "convert._recurrent",
    "convert._params",
    "convert._groups",
    "convert._bitsandbytes",
    "convert._flattened",
    "convert._state",
    "convert._entries",
    "convert._change_storage",
    "convert._keras_variables",
    "convert._keras_file",
    "convert._keras_options",
    "convert._keras",
    "convert._optax",
    "convert._tensorflow",
    "convert._torch",
    "convert",
    "",
]


def name_of(source):
    """A module's name below rmsprop_jax; "" for the package itself."""
    parts = source.relative_to(ROOT / "rmsprop_jax").with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


def imports(source):
    """The modules of the package that a module imports."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rmsprop_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rmsprop_jax."):
            yield node.module.removeprefix("rmsprop_jax.")


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_imports_run_one_way(source):
    """Each module imports only what comes before it in the list."""
    name = name_of(source)
    assert set(imports(source)) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_importing_needs_the_runtime_dependencies_only(source):
    allowed = {"rmsprop_jax", "jax", "optax", "chex", "numpy", *sys.stdlib_module_names}
    tree = ast.parse(source.read_text())
    for node in ast.walk(tree):
        # Only the one function that reads HDF5 imports h5py, when it is called.
        lent = {"h5py"} if name_of(source) == "convert._keras_file" else set()
        within = allowed if node in tree.body else allowed | lent
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= within
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in within


def test_the_changelog_names_the_version():
    assert f"## [{rmsprop_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {rmsprop_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
