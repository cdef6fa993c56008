# Every target sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most tests wait for a service that starts, on one core: two at a time. Those that share one
# run on one worker, and tests that start something come first.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder
STAMP := $(VENV)/.stamp
NODE_STAMP := node_modules/.stamp
# Compiled kernels are kept between runs and shared among test processes.
export NUMBA_CACHE_DIR ?= $(CURDIR)/.cache/numba

.PHONY: help setup check format stubs kernels chart lint-chart dockerfile dockerfile-all demo test test-fast test-long bench-paging clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: $(STAMP) ## make .venv with everything, versions pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(NODE_STAMP): package.json
	@npm install --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@

check: $(STAMP) $(NODE_STAMP) lint-chart ## format, lint, types, import contracts, protos, stale stubs and manifests, kernels that spill
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	node_modules/.bin/buf lint
	node_modules/.bin/buf breaking --against protos/baseline.binpb
	$(BIN)/python tools/generate_stubs.py --check
	$(BIN)/python tools/render_chart.py --check
	$(BIN)/python tools/compile_kernels.py

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

stubs: $(STAMP) ## generate the stubs from the protos
	$(BIN)/python tools/generate_stubs.py

kernels: $(STAMP) ## compile every Triton kernel for three GPUs, none needed; some minutes
	$(BIN)/python tools/compile_kernels.py --all

chart: $(STAMP) ## render k8s/rendered from the chart
	$(BIN)/python tools/render_chart.py

lint-chart: $(STAMP) ## lint manifests and Dockerfile for security (a minute the first time, then ten seconds)
	$(BIN)/python tools/lint_manifests.py

dockerfile: $(STAMP) ## perform the Dockerfile's steps for memory and router, and serve (a minute)
	$(BIN)/python -m tools.exercise_dockerfile memory router

dockerfile-all: $(STAMP) ## the same for the compute images: installs torch, some minutes
	$(BIN)/python -m tools.exercise_dockerfile compute compute-cuda

demo: $(STAMP) ## three services, the demo model, a look at the pool
	@$(BIN)/quire demo

test: $(STAMP) $(NODE_STAMP) ## the test suite but for what is for the night
	$(PYTEST) -m "not long"

test-fast: $(STAMP) $(NODE_STAMP) ## that without token parity through three processes
	$(PYTEST) -m "not slow and not long"

test-long: $(STAMP) $(NODE_STAMP) ## for the night: token parity of the other architectures, both kinds of state folder, property tests over 100,000 operations
	$(PYTEST) -m long
	QUIRE_TEST_EXAMPLES=3000 $(PYTEST) -m "not slow" --timeout 1800 tests/memory_service tests/router

bench-paging: $(STAMP) ## the PagedAttention paper's claims measured on the block manager (two minutes)
	$(BIN)/python -m bench.paging

clean: ## remove what the targets made
	rm -rf $(VENV) node_modules .cache build *.egg-info
