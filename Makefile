# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check bench help

demo: $(INSTALLED)  ## size, quantize, benchmark and serve the embedded model; ends with one table
	@$(BIN)/llmopt demo

test: check  ## lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadscope

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)  ## append this machine's lines to results/
	$(BIN)/llmopt bench demo --workload decode --concurrency 1,8,32 --num-requests 64 --against transformers --results results
	$(BIN)/python -m llmopt_cli.bench.startup --results results
	$(BIN)/python -m llmopt_cli.bench.report results

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /: /'

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard kernels/llmopt_kernels/cpu/*.cpp kernels/llmopt_kernels/cpu/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
