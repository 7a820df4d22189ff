PYTHON ?= python3
PYTHON310 ?= python3.10
PYTHON312 ?= python3.12
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
CONSTRAINTS ?= --constraint constraints.txt
PYTEST := python -m pytest --numprocesses $(WORKERS) --dist worksteal

# The tests whose outcome depends on the versions of torch, Triton, NumPy and Numba.
VERSIONED := $(addprefix tests/,test_golden.py test_formats.py backends engine lab/training/test_checkpoints.py)

SPELLED := src tests benchmarks examples docs .ci .github Makefile pyproject.toml README.md CHANGELOG.md CONTRIBUTING.md

.PHONY: help demo test test-all test-integrations test-lowest test-2.11 lint docs docs-serve package bench gpu clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@sed -nE 's/^([a-z0-9.-]+):.*  ## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target text; do \
		printf 'make %-17s %s\n' "$$target" "$$text" | fold -sw 100 | sed '2,$$s/^/                       /'; done

demo: $(READY)  ## train AdamW and AdEMAMix on the same text, a few minutes on 2 cores, and write a report
	$(BIN)/ademamix compare

test: $(READY)  ## the tests but for those that take minutes
	$(BIN)/$(PYTEST) -m "not slow"

test-all: $(READY)  ## all tests
	$(BIN)/$(PYTEST)

test-integrations: .venv-integrations/.ready  ## the tests with Transformers, Lightning, timm, DeepSpeed and others
	$(<D)/bin/$(PYTEST) tests/integrations tests/test_examples.py

test-lowest: .venv-lowest/.ready  ## the tests that depend on versions, with the oldest ones allowed; needs Python 3.10
test-2.11: .venv-2.11/.ready  ## the same with torch 2.11; needs Python 3.12
test-lowest test-2.11:
	$(<D)/bin/$(PYTEST) -m "not slow" $(VERSIONED)

lint: $(READY)  ## formatting, lint, prose, spelling, layers and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell $(SPELLED)
	$(BIN)/python .ci/prose.py
	$(BIN)/mypy

docs: $(READY)  ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

docs-serve: $(READY)  ## show the documentation on http://127.0.0.1:8000, and what changes in it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

package: $(READY)  ## build the package, check it, and use the wheel in an empty environment
	$(BIN)/python .ci/package.py

bench: $(READY)  ## one optimizer step against torch.optim
	$(BIN)/python benchmarks/step.py

gpu:  ## what has to run on a GPU, in at most 10 minutes: PYTHON has torch, nothing is installed (docs/how-to/gpu.md)
	PYTHONPATH=src:benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m gpu

clean:  ## remove the environments
	rm -rf .venv .venv-integrations .venv-lowest .venv-2.11 site

# Made anew only when the dependencies change; removed if an install fails half way.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@

.venv-integrations/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	DS_BUILD_OPS=0 $(@D)/bin/python -m pip install --quiet $(CONSTRAINTS) --editable ".[integrations]" pytest pytest-xdist hypothesis
	touch $@

.venv-lowest/.ready: private PYTHON := $(PYTHON310)
.venv-2.11/.ready: private PYTHON := $(PYTHON312)
.venv-%/.ready: pyproject.toml constraints-%.txt
	@$(PYTHON) -c "" 2>/dev/null || { echo "make test-$* needs $(PYTHON)" >&2; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints-$*.txt --editable ".[lab]" pytest pytest-xdist hypothesis
	touch $@
