# Everything runs in .venv, which `make` creates; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEXT ?= The performances are wonderful, but the story is a mess.

.DEFAULT_GOAL := help
.PHONY: help demo test format lint types imports pytest coverage clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,benchmark]"
	@touch $@

demo: $(VENV)/.installed  ## Install, and explain a text with the embedded model (TEXT="...").
	$(BIN)/attnlrp-fx explain "$(TEXT)" --html explanation.html

test: lint types imports pytest  ## Install, and run formatter, linter, type checker and tests.

format: $(VENV)/.installed  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.installed  ## Check formatting and lint.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed  ## Check types.
	$(BIN)/mypy

imports: $(VENV)/.installed  ## Check that layers import downwards only.
	$(BIN)/lint-imports --no-logo

pytest: $(VENV)/.installed  ## Run the tests and the doctests of README and docstrings.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

coverage: $(VENV)/.installed  ## Run the same, and list the lines that no test reaches.
	OMP_NUM_THREADS=1 $(BIN)/python -m slipcover --source attnlrp_fx,passes --omit 'attnlrp_fx/passes/*' \
		--fail-under 90 -m pytest -W ignore::pytest.PytestAssertRewriteWarning

clean:  ## Remove the environment and caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
