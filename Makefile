PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench gpu clean

demo: $(READY)  ## train AdamW and AdEMAMix on the same text, a few minutes on 2 cores, and write a report
	$(BIN)/ademamix compare

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

lint: $(READY)  ## formatting, lint and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## one optimizer step against torch.optim
	$(BIN)/python benchmarks/step.py

gpu:  ## what has to run on a GPU, in at most 10 minutes: PYTHON has torch, nothing is installed (docs/gpu.md)
	PYTHONPATH=src:benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m gpu

clean:  ## remove the environment
	rm -rf .venv

# Made anew only when the dependencies change; removed if an install fails half way.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
