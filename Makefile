# `make` lists the targets. Every target that runs something installs first, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A GPU machine may bring its own Python with torch and Triton, into which nothing is installed.
PYTHON_GPU ?= $(BIN)/python
OTHER_TRITON := $(VENV)/triton-3.6/.installed
# Clients of others, in environments of their own: no torch, and nothing of ours but the server.
ACCEPTANCE := $(VENV)/acceptance
PEERS := build/peers
CLIENTS := tests/acceptance
MEET := ACCEPTANCE_SERVER=$(CURDIR)/$(BIN)/oneplusn ACCEPTANCE_NODE=$(CURDIR)/$(ACCEPTANCE)/node
TORCH := $(shell grep '^torch==' constraints.txt)

# Keep the current folder off sys.path: kernels/ and adapters/ are names of other packages.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install serve demo test check fmt lint types acceptance bench bench-peers bench-swap bench-scale growth experiments slow-training other-triton kernel-report gpu-smoke container-steps clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $@

$(OTHER_TRITON): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==3.6.0
	touch $@

$(ACCEPTANCE)/openai-%/.installed: $(CLIENTS)/requirements-openai-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(PEERS)/%/.installed: oneplusn/loadtest/peers/requirements/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(ACCEPTANCE)/node/.installed: $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	mkdir -p $(@D)
	cp $^ $(@D)
	npm ci --prefix $(@D) --no-audit --no-fund
	touch $@

install: $(STAMP) ## make .venv with the pinned versions

serve: $(STAMP) ## serve the demo model on 127.0.0.1
	$(BIN)/oneplusn serve

demo: $(STAMP) ## serve the demo model and send it one mixed batch
	$(BIN)/oneplusn demo

test: $(STAMP) $(OTHER_TRITON) ## run the tests that need no GPU and no minutes
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
	$(BIN)/mypy experiments

acceptance: $(STAMP) $(patsubst %,$(ACCEPTANCE)/%/.installed,openai-2 openai-3 node) ## real clients against a real server (minutes, Node 20)
	cd $(CLIENTS) && $(MEET) $(CURDIR)/$(ACCEPTANCE)/openai-2/bin/pytest \
		test_openai.py test_litellm.py test_llama_index.py test_instructor.py
	cd $(CLIENTS) && $(MEET) $(CURDIR)/$(ACCEPTANCE)/openai-3/bin/pytest \
		test_openai.py test_openai_npm.py test_langchain_openai.py test_text_generation.py \
		test_lorax.py test_schemathesis.py

bench: $(STAMP) ## measure throughput and latency, and print where
	$(BIN)/python -m oneplusn.loadtest.bench $(ARGS)

bench-peers: $(STAMP) $(patsubst %,$(PEERS)/%/.installed,gguf transformers peft) ## measure beside other servers, and fail if a floor is missed (most of an hour)
	$(BIN)/python -m oneplusn.loadtest.bench --model small,mid --peers all --environments $(PEERS) $(ARGS)

bench-swap: $(STAMP) ## flip an adapter's versions under load, and print what it cost the others
	$(BIN)/python -m oneplusn.loadtest.swap $(ARGS)

bench-scale: $(STAMP) ## what 4,096 registered tasks cost: throughput, memory, loads (an hour, 20 GB)
	$(BIN)/python -m oneplusn.loadtest.scale --out docs/benchmarks $(ARGS)

growth: $(STAMP) ## how throughput and latency grow with clients, adapters, context (minutes a curve)
	$(BIN)/python -m oneplusn.loadtest.growth --out docs/benchmarks $(ARGS)

container-steps: $(STAMP) ## run the steps of the CPU image in a clean folder (minutes)
	$(BIN)/pytest -m slow tests/test_containers.py

experiments: $(STAMP) ## what the methods do under conflict, with separation, over ranks (most of an hour)
	PYTHONPATH=$(CURDIR) $(BIN)/python -m experiments.e1 $(ARGS)
	PYTHONPATH=$(CURDIR) $(BIN)/python -m experiments.e2 $(ARGS)
	PYTHONPATH=$(CURDIR) $(BIN)/python -m experiments.e3 $(ARGS)

slow-training: $(STAMP) ## the slow tests of training and of kills (half an hour)
	$(BIN)/pytest -m slow tests/adapters

other-triton: $(OTHER_TRITON) ## the oldest Triton, for the kernel report and its test

kernel-report: $(STAMP) $(OTHER_TRITON) ## what the GPU kernels compile to, and whether it holds
	$(BIN)/python -m oneplusn.server.tools.kernel_report

gpu-smoke: $(if $(filter $(BIN)/%,$(PYTHON_GPU)),$(STAMP)) ## check and time the kernels on a GPU; without one, a dry run
	PYTHONPATH=$(CURDIR) $(PYTHON_GPU) -m oneplusn.kernels.smoke $(ARGS)

clean: ## remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
