# Two commands on a fresh machine (Python 3.11+, a C++ compiler): `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# Another torch than the locked one, where none is installed yet: arguments of `pip install`. For example
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
TORCH ?=
RUN := $(VENV)/bin
# What the package consists of, in whatever folders: an editable installation knows the files that it was made with.
FILES := $(sort $(shell find src/actsparse -type f -not -path '*/__pycache__/*'))
NATIVE := $(filter-out %.py %.jinja,$(FILES))

.PHONY: setup demo test test-vllm lint lock bench wheel clean always

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml CMakeLists.txt requirements/install.py $(wildcard requirements/*.txt) $(NATIVE) $(VENV)/.files
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python requirements/install.py --torch '$(TORCH)'
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Touched only when a file has come or gone.
$(VENV)/.files: always
	@mkdir -p $(VENV)
	@echo $(FILES) | cmp -s - $@ || echo $(FILES) > $@

# Today's releases inside the ranges of pyproject.toml, for every platform; see requirements/lock.py.
lock: setup
	PATH="$(abspath $(RUN)):$$PATH" $(RUN)/python requirements/lock.py

demo: setup
	$(RUN)/python benchmarks/demo.py

test: setup
	$(RUN)/python -m pytest

# The plug-in beside vLLM's CPU build, in an environment of its own (3 GB; .ci/run keeps it elsewhere).
VLLM_VENV ?= integrations/vllm/.venv
test-vllm: setup
	$(RUN)/python integrations/vllm/environment.py $(VLLM_VENV)
	cd integrations/vllm && $(abspath $(VLLM_VENV))/bin/python -m pytest

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: setup
	$(RUN)/python benchmarks/kernels.py
	$(RUN)/python benchmarks/packed.py
	$(RUN)/actsparse bench --shape llama-1b --method chess --sparsity 0.3,0.5,0.7

wheel: setup
	$(RUN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)
