# Two commands on a fresh machine: `make demo` and `make test`. Everything else is a part of them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes of `make test`: 2, or 1 where there is one core. More cores: make test PYTEST_WORKERS=4
PYTEST_WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); \
	[ $$cores -lt 2 ] && echo 0 || echo 2)
# `worksteal` gives each process a contiguous half of the tests, so that module fixtures are built once.
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

.PHONY: demo test test-slow lint types bench clean

demo: $(STAMP)
	$(BIN)/fedface run experiments/demo.yaml

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)  # minutes; benchmarks/latent_search.py, full_size.py and quality_counts.py take longer
	$(BIN)/python benchmarks/secure_aggregation.py
	$(BIN)/python benchmarks/private_step.py --rounds 3

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
