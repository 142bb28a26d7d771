# make run: install, probe the four bundled models, say where the report lies.
# make test: install with test tools, pass the tests.  make check: lint, types, import floors as well.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
TRANSFORMERS := 5.23.0

.PHONY: run test check clean

run: $(VENV)/.run
	$(BIN)/eigencache report

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# torch first and alone: where pip finds a CPU build of the pinned version it takes that, and no later step replaces it.
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet transformers==$(TRANSFORMERS) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
