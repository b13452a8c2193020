# Every target makes its own environment: a machine needs only Python 3.11 or newer, git, make and a package index.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help demo test test-all lint bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer, with venv, is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON); the first time this downloads PyTorch and takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[dev]'
	@touch $@

$(BENCH_READY): $(READY)
	@$(PIP) -e '.[dev,bench]'
	@touch $@

demo: $(READY) ## train a small network, prune it to a tenth of its MACs, and show the proof
	@$(BIN)/secateurs demo $(ARGS)

test: $(READY) ## the fast tests and every docstring's example
	@$(BIN)/python -m pytest -q $(ARGS)

test-all: $(READY) ## the slow tests too
	@$(BIN)/python -m pytest -q -m '' $(ARGS)

lint: $(READY) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

BENCHMARKS ?= surgery_speed vgg16_article

bench: $(BENCH_READY) ## the short measurements in benchmarks/ (BENCHMARKS="name ..." for others)
	@for name in $(BENCHMARKS); do $(BIN)/python -W ignore -m benchmarks.$$name $(ARGS) || exit 1; done

clean: ## remove the environment, caches and builds; run directories stay
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
