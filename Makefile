# Two commands do everything on a fresh machine: make train, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process for each core, at most 8.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: train test test-all test-part rehearse test-gpu test-matrix golden docs lint types resolve
train: $(VENV)/installed
	CUDA_VISIBLE_DEVICES= $(BIN)/longspan train quickstart $(ARGS)

test: $(VENV)/installed
	$(PYTEST)

test-all: test
	$(PYTEST) -m "wide and not gpu"

# A sixth of the wide tests: which one depends on the number of commits, so that it changes as work lands.
WIDE_PARTS := 6
PART ?= $(shell echo $$(( $$(git rev-list --count HEAD) % $(WIDE_PARTS) + 1 )))
test-part: $(VENV)/installed
	$(PYTEST) -m "wide and not gpu" --part $(PART)/$(WIDE_PARTS)

# Shipped recipes on GPUs that are not here; see docs/rehearsing.md.
rehearse: $(VENV)/installed
	$(PYTEST) -m "" tests/launch/rehearsal

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

# A core of the tests with the oldest and the newest supported packages, where these have builds for CPUs.
test-matrix: $(VENV)/installed
	$(BIN)/python tests/matrix.py

# Writes the golden files anew; read the diff before it is committed.
golden: $(VENV)/installed
	GOLDEN=write OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/golden -m ""

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files -- ':!*.png' ':!*.json' ':!tests/golden')

# The repository's root is the package longspan: mypy finds it by that name beside its link.
types: $(VENV)/installed
	mkdir -p build/types && ln -sfn $(CURDIR) build/types/longspan
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml

# Whether an ordinary machine can install the constraints: PyPI alone, no local wheels, nothing fetched. Without a
# network nobody can tell, which is no failure.
resolve: $(VENV)/installed
	@problem=$$(env -u UV_FIND_LINKS $(BIN)/uv pip compile -q --no-config --python-version 3.11 \
		--python-platform x86_64-unknown-linux-gnu -c constraints.txt --extra test pyproject.toml \
		-o /dev/null 2>&1) && exit 0; echo "$$problem"; echo "$$problem" | grep -q "error sending request" && \
		echo "resolve: SKIPPED, as no package index can be reached"

# API pages from the docstrings.
docs: $(VENV)/installed
	$(BIN)/python docs/api.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt --editable '.[test]'
	touch $@
