PYTHON ?= python3
BIN := .venv/bin

.PHONY: example example-airfoil test lint clean

example: .venv/examples-installed
	$(BIN)/python examples/simplenet.py --out out/simplenet.png

example-airfoil: .venv/examples-installed
	$(BIN)/python examples/simplenet.py --data airfoil --out out/simplenet_airfoil.png

test: lint
	$(BIN)/python -m pytest

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out build dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%-installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

.venv/examples-installed: EXTRAS := examples
.venv/test-installed: EXTRAS := test,lint
