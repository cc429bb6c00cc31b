# Every target sets up its own .venv from nothing. PYTHON=python3.12 chooses another interpreter.
#
# torch is pinned by constraints.txt. On Linux the package index's torch is a CUDA build of several GB; to take a
# CPU wheel instead, point pip at a folder or an index that has one (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint types format bench venv assets clean compiler

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

demo: $(VENV)/.stamp-dev ## quantise the real MiniLM encoder, ONNX to ONNX, and print the comparison
	$(BIN)/python bench/encoder.py --demo

test: $(VENV)/.stamp-dev ## the fast tests (under 10 minutes on two cores)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.stamp-dev ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.stamp-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev ## mypy, strict on ir, passes and codegen
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-bench ## every measurement, peers beside planish in one run
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/spaces.py
	$(BIN)/python bench/roundtrip.py
	$(BIN)/python bench/encoder.py
	$(BIN)/python bench/zoo.py --peers
	$(BIN)/python bench/gemma.py
	$(BIN)/python bench/passes.py
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/oracle.py
	$(BIN)/python bench/gpu.py
	$(BIN)/python bench/backend.py
	$(BIN)/python bench/accuracy.py

assets: $(VENV)/.stamp-dev ## fetch the real models and texts into the cache
	$(BIN)/python bench/assets.py --all

venv: $(VENV)/.stamp-dev ## only set up .venv

clean: ## remove .venv and the tools' caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON): not found; planish needs Python 3.11 or newer. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is `$(PYTHON) -V 2>&1`; planish needs 3.11 or newer. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# torch.compile and planish's kernels for the CPU need a C++ compiler. What asks for one is asked for once, here.
compiler:
	@command -v g++ >/dev/null || { test "`id -u`" = 0 && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends g++; } || { \
	  echo "make: g++: not found; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }

$(VENV)/.stamp-dev: $(INPUTS) | $(BIN)/python compiler
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@
