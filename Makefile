# Two commands on a fresh machine (Python 3.11+, a C++ compiler): `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# Which torch to install where none is there yet. On Linux without an NVIDIA GPU the CPU build is the one to take:
#   make setup TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin

.PHONY: setup demo test lint bench wheel clean

setup: $(VENV)/.ready

# The package's folders are named so that a new file installs itself.
SOURCES := $(shell find src -type d) $(wildcard src/actsparse/kernels/cpu/csrc/*)
$(VENV)/.ready: pyproject.toml CMakeLists.txt $(SOURCES)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -c "import torch" 2>/dev/null || $(RUN)/python -m pip install --quiet $(TORCH)
	$(RUN)/python -m pip install --quiet "scikit-build-core>=0.10" "cmake>=3.20" ninja
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: setup
	$(RUN)/python benchmarks/demo.py

test: setup
	$(RUN)/python -m pytest

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: setup
	$(RUN)/python benchmarks/kernels.py
	$(RUN)/actsparse bench --shape llama-1b --method chess --sparsity 0.3,0.5,0.7

wheel: setup
	$(RUN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)
