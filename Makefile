# make demo: set up, then compare FP32 with 16-bit training on a built-in GPT, and write a report.
# make test: set up, then run all tests.   make check: lint, types and tests, as continuous integration does.
#
# make VENV=folder …: another environment than .venv, such as the one you are in (VENV=$VIRTUAL_ENV, VENV=$CONDA_PREFIX).
# A torch that is installed there already is kept, whatever its version and build.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

#: PyTorch of the pins: the newest of which continuous integration has a build without CUDA. Newer ones: docs/tested.md.
TORCH = 2.13.0

.PHONY: demo test test-avx2 gpu lint check resolve pins matrix clean

demo: $(STAMP)
	$(BIN)/halfstep demo

# A worker that crashes ends the run with the name of its test.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0

test: $(STAMP)
	$(PYTEST)

# As on a CPU that has AVX2 and no more: what its kernels lack shows here. Compiled code is kept apart: what was compiled
# for AVX-512 crashes there.
AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-avx2: $(STAMP)
	$(AVX2) TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 $(PYTEST) $(TESTS)

# On a machine with a GPU, twelve minutes: is it right, and if so, how fast is it? docs/gpu.md; results in build/gpu.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu_once.py --set smoke --budget 240 --out build/gpu
	$(BIN)/python benchmarks/gpu_once.py --set main --budget 455 --out build/gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# Can the pins be installed, from the public registry alone, by every Python and system that they are for?
resolve: $(STAMP)
	$(BIN)/python tools/resolve.py

# The pins anew, for all of them at once.
pins: $(STAMP)
	$(BIN)/python tools/resolve.py --write --torch $(TORCH)

# The whole suite over versions of Python and PyTorch: hours and tens of gigabytes; writes docs/tested.md.
matrix: $(STAMP)
	$(BIN)/python tools/matrix.py

# Pins of torch and of what comes with it hold only where none is there yet.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard src/halfstep/optim/backends/kernels/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	if $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)'; \
	then sed -E '/^(torch|triton|cuda-|nvidia-)/d' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv build src/*.egg-info
