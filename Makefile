# `make quickstart` and `make test` make what they need: a virtual environment in .venv, with the versions of
# constraints.txt. Done once, it is done: only a change of pyproject.toml or constraints.txt installs again.
# PYTHON chooses the interpreter with which .venv is made (3.11 or newer).

PYTHON ?= python3
TORCH ?= torch
IN_VENV := .venv/bin/python -m
# Tiny models spend their time in XLA: without most of its optimizations, and with its older emitters, a quarter of it.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="--xla_cpu_use_fusion_emitters=false $$XLA_FLAGS"
INSTALL := $(IN_VENV) pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-vision test test-slow test-parity test-tpu benchmark-baseline benchmark-tables clean
.NOTPARALLEL:  # two installs into one environment would meet

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/quickstart.installed  ## Train a small model on the CPU, from nothing (or continue)
	$(IN_VENV) pe_rlhf_jax.main --config configs/quickstart.yaml

quickstart-vision: .venv/quickstart.installed  ## Train a small model on questions about drawn pictures, on the CPU
	$(IN_VENV) pe_rlhf_jax.main --config configs/quickstart_vision.yaml

test: .venv/dev.installed  ## Lint, layout, types and the fast tests
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(QUICKLY) $(IN_VENV) pytest --numprocesses logical --maxprocesses 4 --dist loadgroup

test-slow: .venv/gcs.installed  ## Tests with the real model, fetched on the first run; minutes
	$(IN_VENV) pytest -m 'slow and not parity'

test-parity: .venv/parity.installed  ## Comparisons with torch and peft; TORCH=WHEEL chooses a build
	$(IN_VENV) pytest -m parity

test-tpu: .venv/tpu-plan.installed  ## Plans for TPU slices, with the real TPU compiler; needs no TPU
	$(IN_VENV) pytest -m tpu

benchmark-baseline: .venv/benchmarks.installed  ## TF-IDF and logistic regression on the quickstart's preference pairs
	.venv/bin/python benchmarks/tfidf_baseline.py --config configs/quickstart.yaml

benchmark-tables: .venv/quickstart.installed  ## The paper's memory and speed table on the quickstart's model and this device
	.venv/bin/python benchmarks/paper_tables.py --config configs/quickstart.yaml

clean:  ## Remove .venv and what tools leave behind; runs/ and downloads stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find pe_rlhf_jax tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

# A stamp is written after its install has ended well, so an interrupted one is done again.
.venv/%.installed: .venv/made pyproject.toml constraints.txt
	@echo "Installing pe_rlhf_jax[$*] into .venv; the first time takes a few minutes."
	$(INSTALL) --editable '.[$*]'
	@touch $@

.venv/gcs.installed .venv/tpu-plan.installed: .venv/dev.installed

.venv/parity.installed: .venv/dev.installed
	@echo "Installing $(TORCH) and peft into .venv."
	$(INSTALL) '$(TORCH)'
	$(INSTALL) --editable '.[parity]'
	@touch $@

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; \
	$(PYTHON) is `$(PYTHON) --version 2>&1`. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@.venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		$(PYTHON) -m venv --clear .venv
	@touch $@
