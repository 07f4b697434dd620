# `make` lists the targets. Every target that runs something installs first, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

# Keep the current folder off sys.path: kernels/ and adapters/ are names of other packages.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install serve demo test check fmt lint types bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $@

install: $(STAMP) ## make .venv with the pinned versions

serve: $(STAMP) ## serve the demo model on 127.0.0.1
	$(BIN)/oneplusn serve

demo: $(STAMP) ## serve the demo model and send it one mixed batch
	$(BIN)/oneplusn demo

test: $(STAMP) ## run the tests that need no GPU and no minutes
	$(BIN)/pytest

check: lint types test ## what CI runs: lint, types, tests

fmt: $(STAMP) ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP) ## ruff, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy in strict mode
	$(BIN)/mypy -p oneplusn

bench: $(STAMP) ## measure throughput and latency, and print where
	$(BIN)/python -m oneplusn.loadtest.bench

clean: ## remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
