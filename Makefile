# One virtual environment, made when it is missing. Override: make test PYTHON=python3.12 VENV=/path
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
STAMP := $(VENV)/.installed
export PYTHONSAFEPATH = 1

.PHONY: help setup check test test-fast test-lowest fuzz campaign demo bench docs lock images clean

help:  ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cmae needs Python >= 3.11; this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## make .venv with everything the project needs (6 GB with CUDA)

check: $(STAMP)  ## format, lint, types, import rules, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/hadolint docker/Dockerfile

test: $(STAMP)  ## all tests that this machine can run
	$(BIN)/pytest -n $(JOBS) --dist worksteal --durations 15

test-fast: $(STAMP)  ## the tests that take no more than seconds each
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m 'not slow'

LOWEST ?= .venv-lowest
test-lowest: $(STAMP)  ## the fast tests with the oldest versions that pyproject.toml allows (6 GB more)
	$(BIN)/python -m uv venv --quiet --allow-existing --python $(PYTHON) $(LOWEST)
	$(BIN)/python -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[demo,s3,gs]'
	$(BIN)/python -m uv pip install --quiet --python $(LOWEST)/bin/python pytest pytest-xdist hypothesis 'moto[server]>=5'
	$(LOWEST)/bin/pytest -n $(JOBS) --dist worksteal -m 'not slow'

FUZZ_S ?= 600
fuzz: export PYTHONPATH = tests:.
fuzz: $(STAMP)  ## mutated inputs for every parser, FUZZ_S seconds in all -> runs/fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_S)

FAULTS ?= 200
campaign: export PYTHONPATH = tests:.
campaign: $(STAMP)  ## kills, torn files, full disks at random instants of small runs, FAULTS of them -> runs/campaign
	$(BIN)/python -m tests.campaigns.run --faults $(FAULTS)

demo: $(STAMP)  ## pretrain a micro CMAE on real photographs and look at what it learnt
	$(BIN)/cmae demo

docs bench: export PYTHONPATH = benchmarks

bench: $(STAMP)  ## all CPU benchmarks, under 15 minutes -> benchmarks/results, docs/benchmarks.md
	$(BIN)/python -m lib.suites
	$(BIN)/python -m lib.pages

docs: $(STAMP)  ## tables, plots, the list of settings and printed output in README and docs
	$(BIN)/python -m lib.pages

lock: $(STAMP)  ## pin what the images install (docker/locks) from pyproject.toml
	$(BIN)/python docker/lock.py

images:  ## build the images and start them for real, with docker, podman or buildah
	docker/try.sh

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
