# make demo: set up, then compare FP32 with 16-bit training on a built-in GPT, and write a report.
# make test: set up, then run all tests.   make check: lint, types and tests, as continuous integration does.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint check clean

demo: $(STAMP)
	$(BIN)/halfstep demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard src/halfstep/optim/backends/kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build src/*.egg-info
