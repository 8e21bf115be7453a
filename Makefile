# The two commands: `make demo` and `make test`. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# the interpreter that creates .venv: `make PYTHON=/path/to/python3.12 demo` overrides the search
PYTHON ?= python3
CANDIDATES := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11 python3.10 python3.14)
JOBS ?= 2
PIP_FLAGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# pinned by constraints.txt: a free torch would be another, much larger one
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for python in $(CANDIDATES); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: vitfast needs Python 3.10 or newer, and none of these is: $(CANDIDATES)" >&2; exit 1; \
	  fi; \
	  if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "error: $$found cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	  fi; \
	  echo "==> creating $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "==> installing the pinned packages into $(VENV) (the first time: torch is a large download)"
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt scikit-build-core
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

.PHONY: demo
demo: $(STAMP)  ## put a photograph through the reference and the accelerated ViT
	$(BIN)/vitfast demo

# One torch thread for each pytest worker. Where there is a CUDA device its tests run by themselves, in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
CUDA = $(eval CUDA := $(shell $(BIN)/python -c 'import torch; print("yes" if torch.cuda.is_available() else "")'))$(CUDA)

.PHONY: test
test: $(STAMP)  ## run every test lane this machine can run
	@echo "==> lane: reference and compile$(if $(CUDA),, (no CUDA device: the gpu tests are skipped))"
	$(PYTEST) $(if $(CUDA),-m "not gpu") --ignore tests/emulate tests
	@echo "==> lane: emulate (compiled kernels on a CPU)"
	@$(BIN)/python -m tests.emulate._library
	$(PYTEST) tests/emulate
	@echo "==> lane: interpret"
	TRITON_INTERPRET=1 $(PYTEST) -m interpret tests
	@echo "==> lane: benchmarks (a toy model on CPU; pytest-benchmark does not time in xdist's workers)"
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 benchmarks
	$(if $(CUDA),@echo "==> lane: gpu")
	$(if $(CUDA),$(BIN)/python -m pytest -n 0 -m gpu tests)

.PHONY: versions
versions: $(STAMP)  ## test the lowest and the newest releases of the libraries (ARGS="timm")
	$(BIN)/python tests/versions/run.py -j $(JOBS) $(ARGS)

# mypy sees vitfast/, kernels/ and benchmarks/ as the one package they become when installed
TYPECHECK := build/typecheck
.PHONY: lint
lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/vitfast
	@ln -s $(CURDIR)/vitfast/* $(CURDIR)/kernels $(CURDIR)/benchmarks $(TYPECHECK)/vitfast/
	cd $(TYPECHECK) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

.PHONY: bench
bench: $(STAMP)  ## time vitfast against every peer here (ARGS="--quick")
	$(BIN)/vitfast bench $(ARGS)

.PHONY: gpu
gpu: $(STAMP)  ## tests, parity, bench, tune and profile for a short stay on a GPU machine (ARGS="--minutes 25")
	benchmarks/gpu_day.sh --python $(BIN)/python $(ARGS)

.PHONY: clean
clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find vitfast kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
