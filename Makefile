PYTHON ?= python3
BIN := .venv/bin

.PHONY: example example-airfoil test test-all test-oldest test-tpu test-gpu test-clients test-docs docs compare benchmark lint clean

example: .venv/examples-installed
	$(BIN)/python examples/simplenet.py --out out/simplenet.png

example-airfoil: .venv/examples-installed
	$(BIN)/python examples/simplenet.py --data airfoil --out out/simplenet_airfoil.png

test: lint
	$(BIN)/python -m pytest -m "not slow"

# With what takes long: examples as their users run them, statistics, processes, checkpoints on disk.
test-all: lint
	$(BIN)/python -m pytest

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lower bounds of pyproject.toml, so that they stay what was really run.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest

# Compiles programs for TPUs and reads them; the compiler is for Linux, and needs no TPU.
test-tpu: .venv-tpu/installed
	.venv-tpu/bin/python -m pytest --numprocesses=2 tests/devices/test_tpu.py

# The same for GPUs: jax's CUDA plugin and NVIDIA's assembler, without the libraries for running.
test-gpu: .venv-gpu/installed
	.venv-gpu/bin/python -m pytest --numprocesses=2 tests/devices/test_gpu.py

# The programs of other libraries' users, with our RMSProp and with Optax's.
test-clients: .venv-clients/installed
	.venv-clients/bin/python -m pytest --numprocesses=2 tests/clients

# The site, in out/docs/index.html. A warning, a broken reference or a broken link is an error.
docs: .venv-docs/installed
	rm -rf out/docs out/doctrees
	.venv-docs/bin/sphinx-build --builder html --nitpicky --fail-on-warning --keep-going \
	  --doctree-dir out/doctrees docs out/docs

# How the site is made, and, in a headless Chromium where there is one, what became of it.
test-docs: docs
	.venv-docs/bin/python -m pytest --numprocesses=2 tests/docs

# Runs the frameworks themselves beside their recorded runs and our dialects.
compare: .venv-compare/installed
	.venv-compare/bin/python tests/compare/record_dialects.py --check
	.venv-compare/bin/python tests/compare/record_rows.py --check
	.venv-compare/bin/python tests/compare/record_convert.py --check
	.venv-compare/bin/python tests/compare/record_forms.py --check
	.venv-compare/bin/python tests/compare/record_bitsandbytes.py --check
	.venv-compare/bin/python tests/compare/record_keras_files.py --check
	.venv-compare/bin/python tests/compare/record_simplenet.py --check
	.venv-compare/bin/python tests/compare/record_resume.py --check
	.venv-compare/bin/python -m pytest tests/examples/test_simplenet.py tests/examples/test_resume_from_pytorch.py

# Of the processor; benchmarks/README.md says which take longer, and how to measure a GPU.
benchmark: .venv-benchmark/installed
	for name in step eager compilation memory low_memory_step report; do \
	  .venv-benchmark/bin/python benchmarks/$$name.py || exit; \
	done

clean:
	rm -rf .venv .venv-* out build dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one as in: make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv

.venv/%-installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

.venv/examples-installed: EXTRAS := examples
.venv/test-installed: EXTRAS := test,lint

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[test]' \
	  jax==0.9.0 jaxlib==0.9.0 optax==0.2.8 chex==0.1.91 flax==0.12.6 orbax-checkpoint==0.12.8
	touch $@

.venv-tpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --editable . 'jax[tpu]' pytest pytest-xdist
	touch $@

.venv-gpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable . pytest pytest-xdist tqdm
	version=$$(.venv-gpu/bin/python -c 'import jax; print(jax.__version__)'); \
	.venv-gpu/bin/python -m pip install --quiet --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version 'nvidia-cuda-nvcc==13.*'
	touch $@

.venv-clients/installed: pyproject.toml
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --editable '.[clients]'
	touch $@

.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv-benchmark/installed: pyproject.toml
	$(PYTHON) -m venv .venv-benchmark
	.venv-benchmark/bin/python -m pip install --quiet --editable '.[benchmark]'
	touch $@

.venv-compare/installed: pyproject.toml
	$(PYTHON) -m venv .venv-compare
	.venv-compare/bin/python -m pip install --quiet --editable '.[compare,test]'
	touch $@
