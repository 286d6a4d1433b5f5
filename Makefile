# Variables of the set-up: PYTHON, the interpreter to use; DEVICE, cpu or cuda (default: what is there).
PYTHON ?=
DEVICE ?=
export PYTHON DEVICE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup test test-kernels test-units test-engines lint type-check docs wheel test-gpu demo clean

help:
	@echo "make setup     create or complete $(VENV)"
	@echo "make test      set-up, then ruff, mypy, pytest"
	@echo "make test-gpu  set-up, then the tests that need a CUDA device"
	@echo "make demo      set-up, then serve the small model and ask it about a long document"
	@echo "make docs      set-up, then build the documentation into site/"
	@echo "make wheel     set-up, then build sdist and wheel into dist/"
	@echo "make clean     remove $(VENV) and what builds and tools leave behind"

setup: $(STAMP)

# The stamp lies in the environment, so that it goes when the environment goes.
$(STAMP): setup.cfg install/create_environment.sh install/install_packages.py
	install/create_environment.sh
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type-check: setup
	$(BIN)/mypy

# Strict: a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: setup
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"

# One after the other: a server's processes and their client starve beside the kernels' tests on two
# cores, and tests that look at a running request come too late.
test: lint type-check docs
	$(MAKE) test-kernels
	$(MAKE) test-units
	$(MAKE) test-engines

# The tests run several processes on few cores.
test-kernels test-units test-engines: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest
IN_PARALLEL := -n auto --maxprocesses 8
# No servers, and no clock that a busy machine could upset.
UNITS := tests/attention tests/config tests/decoding tests/models tests/packaging tests/planning tests/quality \
	tests/reference tests/scheduling tests/worker $(wildcard tests/test_*.py)

# Triton kernels run in its interpreter, which must be chosen before Triton is imported; it uses one
# core, so there are as many processes as cores.
test-kernels: setup
	TRITON_INTERPRET=1 $(PYTEST) $(IN_PARALLEL) tests/kernels

# Tests of one file share what was costly to prepare.
test-units: setup
	$(PYTEST) $(IN_PARALLEL) --dist loadfile $(UNITS)

test-engines: setup
	$(PYTEST) tests $(addprefix --ignore=,tests/kernels $(UNITS))

test-gpu: setup
	$(PYTEST) tests -m gpu

demo: setup
	$(BIN)/python examples/ask_long_document.py

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
