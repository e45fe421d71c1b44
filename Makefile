# chiasm: every target works in a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# What is never imported need not be compiled.
INSTALL := $(PIP) install --quiet --no-compile
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test
SOURCES := pyproject.toml setup.py constraints-cpu.txt $(wildcard protos/*/*.proto protos/*/*/*.proto)

# Both recipes below install into one environment.
.NOTPARALLEL:

define ENVIRONMENT
	$(PYTHON) -c 'import sys; sys.exit("chiasm needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) -c constraints-cpu.txt torch
endef

.PHONY: help demo test lint format protos bench clean

help: ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-8s %s\n", $$1, $$2}'

$(INSTALLED): $(SOURCES)
	$(ENVIRONMENT)
	$(INSTALL) -c constraints-cpu.txt -e .
	touch $@

$(TEST_INSTALLED): $(SOURCES) tests/requirements-nodeps.txt
	$(ENVIRONMENT)
	$(INSTALL) -c constraints-cpu.txt -e '.[test,bench,train]'
	$(INSTALL) --no-deps -r tests/requirements-nodeps.txt
	touch $(INSTALLED) $@

demo: $(INSTALLED) ## Start all services on a small model, ask about a picture, show where the time went
	$(BIN)/chiasm demo

test: $(TEST_INSTALLED) ## Run every test
	PYTHONSAFEPATH=1 $(BIN)/pytest -n auto --no-loadscope-reorder

lint: $(TEST_INSTALLED) ## Ruff, mypy, import layers, protobuf lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos

format: $(TEST_INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(INSTALLED) ## Generate the gRPC stubs again after editing a .proto
	$(INSTALL) --no-deps -e .

bench: $(TEST_INSTALLED) ## Measure, side by side, on this machine
	$(BIN)/python -m benchmarks

clean: ## Remove everything that was built
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find src/chiasm/v1 -name '*_pb2*' -delete
