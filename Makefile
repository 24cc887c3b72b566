# Two commands do everything on a fresh clone: `make demo` and `make test`.
# PYTHON=python3.12 VENV=/elsewhere make test    chooses the interpreter and the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test test-slow lint format bench wheel clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/sarm demo

# A process for each of two cores: the kernels' tests are many and small.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')
	$(BIN)/typos

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

bench: $(READY)
	$(BIN)/python benches/run.py

wheel: $(READY)
	$(BIN)/pip wheel . --no-build-isolation --no-deps --wheel-dir dist

# torch comes first, because the extension is built against the installed one.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja --constraint $(CONSTRAINTS)
	$(BIN)/pip install --quiet torch numpy --constraint $(CONSTRAINTS)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]" --constraint $(CONSTRAINTS)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info sarm/_C*.so
