# Every target that needs Python makes .venv itself; nothing has to be installed by hand.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PPO_PEER := .venv-ppo
STORAGE ?= runs
CACHE := $(if $(PLUMBLINE_CACHE),$(PLUMBLINE_CACHE),$(HOME)/.cache/plumbline)
UV := $(BIN)/uv --quiet
CLUSTER := PYTHONPATH=tests $(BIN)/python -m cluster
export UV_CACHE_DIR ?= $(CACHE)/uv
export UV_SYSTEM_CERTS ?= 1
# Every stage is a process of its own: one that may not keep compiled files compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test test-unit check gen image cluster-up cluster-quickstart cluster-down e2e bench bench-trainer rlhf lock format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is %d.%d. Try: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# What a run on this machine needs.
$(VENV)/.run: requirements/trainer.txt requirements/demo.txt pyproject.toml | $(BIN)/uv
	$(UV) pip install -r requirements/trainer.txt
	$(UV) pip install --no-deps -r requirements/demo.txt
	$(UV) pip install --no-deps -e .
	@touch $@

# What tests, checks and generators need on top.
$(VENV)/.dev: requirements/all.txt $(VENV)/.run
	$(UV) pip install -r requirements/all.txt
	@touch $@

# trl's last release with PPO, for parity and the benchmark; it cannot stand beside the one that the other methods use.
$(PPO_PEER)/.made: requirements/ppo-peer.txt | $(BIN)/uv
	$(UV) venv --clear --python $(BIN)/python $(PPO_PEER)
	$(UV) pip install --python $(PPO_PEER)/bin/python -r requirements/ppo-peer.txt
	@touch $@

quickstart: $(VENV)/.run ## Train, merge and evaluate a small model on this machine, then write a report
	$(BIN)/plumbline run examples/01-quickstart/pipeline.yaml --storage $(STORAGE)

test: $(VENV)/.dev $(PPO_PEER)/.made ## Every test this machine can run; says what was left out and why
	hack/run-tests

test-unit: $(VENV)/.dev ## Tests that need no cluster and no network
	$(BIN)/python -m pytest tests/unit

check: $(VENV)/.dev ## Format, lint, types, import rules, generated files, licences
	$(BIN)/ruff format --check operator trainer_image tests hack charts
	$(BIN)/ruff check operator trainer_image tests hack charts
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/lint-imports
	$(BIN)/python -m plumbline_api.generate --check
	$(BIN)/pip-licenses --from=mixed > /dev/null

format: $(VENV)/.dev ## Format and mend what can be mended
	$(BIN)/ruff format operator trainer_image tests hack charts
	$(BIN)/ruff check --fix operator trainer_image tests hack charts

gen: $(VENV)/.dev ## Write CRDs, the chart's copy and the reference from the models
	$(BIN)/python -m plumbline_api.generate

image: $(VENV)/.dev ## Build the operator and the trainer image with docker, podman or buildah
	hack/build-images

cluster-up: $(VENV)/.dev ## Start a throw-away cluster with S3, images and the operator's CRDs
	$(CLUSTER) up

cluster-quickstart: $(VENV)/.dev ## The quickstart pipeline on a throw-away cluster, by Helm and kubectl
	PYTHONPATH=tests $(BIN)/python hack/cluster_quickstart.py

cluster-down: $(VENV)/.dev ## Remove everything that cluster-up made
	$(CLUSTER) down

e2e: $(VENV)/.dev ## Tests on the real node with real images, S3 and Helm
	$(BIN)/python -m pytest tests/e2e

bench: $(VENV)/.dev ## Measure hand-over, operator memory, checkpoint transfer, rollouts and the quickstart
	$(BIN)/python -m tests.bench

rlhf: $(VENV)/.run ## Run the RLHF example on the real model and draw its curves; 36 minutes on two busy cores
	$(BIN)/plumbline run examples/09-rlhf/pipeline.yaml --storage $(STORAGE)
	$(BIN)/python hack/rlhf_curves.py $(STORAGE)

bench-trainer: $(VENV)/.dev $(PPO_PEER)/.made ## Measure the training engine beside trl; BENCH="--methods dpo --rows 32" asks for less
	$(BIN)/python -m tests.bench.trainer $(BENCH)

lock: $(BIN)/uv ## Pin the dependencies anew
	$(UV) pip compile pyproject.toml --all-extras --group dev --python-version 3.11 --no-header --no-annotate -o requirements/all.txt
	$(UV) pip compile pyproject.toml --extra operator -c requirements/all.txt --python-version 3.11 --no-header --no-annotate -o requirements/operator.txt
	$(UV) pip compile pyproject.toml --extra trainer --extra demo -c requirements/all.txt --python-version 3.11 --no-header --no-annotate -o requirements/trainer.txt
	grep -v '^trl==' requirements/all.txt > $(VENV)/shared.txt
	$(UV) pip compile requirements/ppo-peer.in -c $(VENV)/shared.txt --python-version 3.11 --no-header --no-annotate -o requirements/ppo-peer.txt

clean: ## Remove the environment and what runs wrote here
	rm -rf $(VENV) $(PPO_PEER) runs .pytest_cache .mypy_cache .ruff_cache
