# Two commands do all the set-up from a fresh clone:
#   make quickstart   the main job: fine-tune a pretrained MiniLM on real text, five ways
#   make test         the tests
# Contributors also use `make lint` (ruff and pyright) and `make tables`; see CONTRIBUTING.md.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS ?= experiments,test
TESTS ?= tests subspace_jax experiments

.PHONY: quickstart test lint tables clean

$(VENV)/.installed-$(EXTRAS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch "$@"

# Pyright reads what the extras bring, so the linters join the environment of the tests.
$(VENV)/.installed-lint: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/pip install --quiet --editable ".[lint]"
	touch "$@"

quickstart: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m experiments quickstart

test: export OPENBLAS_NUM_THREADS ?= 1
test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10 $(TESTS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Writes the generated parts of README.md and docs/.
tables: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) build dist
