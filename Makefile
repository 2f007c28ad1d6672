# Sets up .venv, builds the package into it, and runs what is asked for. Stamp files make the second time fast.
# pip's own settings (PIP_INDEX_URL and the like) decide where torch comes from, and so whether it is a CUDA build.

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
BUILD := build/cmake

BIN := $(CURDIR)/$(VENV)/bin
BUILT := $(VENV)/.built$(CHUNKATTN_CUDA)
CMAKE_CUDA_0 := OFF
CMAKE_CUDA_1 := ON
CMAKE_CUDA_ := AUTO
CPP_FILES = $(shell find csrc benchmarks/cpp tests/cpp \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))
IN_VENV := PATH="$(BIN):$$PATH"
CONFIGURE = $(IN_VENV) cmake -S . -B $(BUILD) -G Ninja -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
  -DCHUNKATTN_CUDA=$(CMAKE_CUDA_$(CHUNKATTN_CUDA))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format test-cpp test-python bench build clean

help: ## Print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 selects the interpreter, CHUNKATTN_CUDA=1 or 0 the CUDA kernels."

demo: build ## Run the demo: a small model reads far past its training length
	$(BIN)/python examples/extend_context.py

test: lint test-cpp test-python ## Check formats, compile every kernel, run the C++ and Python tests

lint: build ## Check formats and lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: build ## Format all sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

test-cpp: build ## Compile the kernels without torch, the .cu files where nvcc is found, and run the C++ tests
	$(CONFIGURE)
	$(IN_VENV) cmake --build $(BUILD) --parallel $(JOBS)
	$(IN_VENV) ctest --test-dir $(BUILD) --output-on-failure

test-python: build ## Run the Python tests
	$(BIN)/python -m pytest

bench: build ## Time the kernels, and what the machine does at best; BENCH="--list" and the like are its options
	$(CONFIGURE)
	$(IN_VENV) cmake --build $(BUILD) --parallel $(JOBS) --target chunkattn_bench
	$(BUILD)/chunkattn_bench $(BENCH)

build: $(BUILT) ## Set up .venv and build the package into it

clean: ## Remove what was built, and .venv
	rm -rf $(VENV) build dist python/*.egg-info python/chunkattn/*.so

$(VENV)/.installed: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "chunkattn: $(PYTHON) was not found: install Python 3.10 or later, or name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "chunkattn: Python 3.10 or later is needed, $(PYTHON) is older: name another with make PYTHON=..."; exit 1; }
	@command -v $(firstword $(if $(filter default undefined,$(origin CXX)),c++,$(CXX))) >/dev/null || { \
	  echo "chunkattn: no C++ compiler was found: install one (g++ 11 or later, or clang++) or set CXX."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "chunkattn: $(PYTHON) has no venv module: install it (on Debian and Ubuntu, the python3-venv package)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch setuptools pybind11 ninja
	@touch $@

$(BUILT): $(VENV)/.installed setup.py $(shell find csrc cmake -type f)
	@echo "Building chunkattn; the first time takes a few minutes."
	@rm -f $(VENV)/.built*
	$(IN_VENV) python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
