# Everything runs in .venv, which `make install` builds once from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-cluster soak services check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python jobs/demo.py --config configs/demo.yaml

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu and not cluster"

# Servers for the cluster tests: S3 (Swift) and what MLflow needs to run on PostgreSQL.
CLUSTER := cluster
SERVICES := .services

test-cluster: services
	$(BIN)/python -m pytest -m "$(CLUSTER)" tests/cluster

soak: services
	$(BIN)/python -m tests.cluster.soak

services: install $(SERVICES)/.installed

$(SERVICES)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SERVICES)
	$(SERVICES)/bin/python -m pip install --quiet swift==2.38.3
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
