# Two commands do everything on a fresh machine: make train, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test test-all test-gpu lint golden
train: $(VENV)/installed
	CUDA_VISIBLE_DEVICES= $(BIN)/longspan train quickstart $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-all: test
	$(BIN)/python -m pytest -m "wide and not gpu"

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

# Writes the golden files anew; read the diff before it is committed.
golden: $(VENV)/installed
	GOLDEN=write OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/golden -m ""

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt --editable '.[test]'
	touch $@
