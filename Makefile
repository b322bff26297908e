# Two commands do all the set-up from a fresh clone:
#   make quickstart   the main job: fine-tune a pretrained MiniLM on real text, four ways
#   make test         the tests
# Contributors also use `make lint` (ruff and pyright), `make tables`, `make docs` and `make dist-check`; see CONTRIBUTING.md.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS ?= experiments,test
TESTS ?= tests subspace_jax experiments

.PHONY: quickstart test lint tables docs dist-check clean

$(VENV)/.installed-$(EXTRAS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch "$@"

# Pyright reads what the extras bring, so the linters join the environment of the tests.
$(VENV)/.installed-lint: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/pip install --quiet --editable ".[lint]"
	touch "$@"

# With glibc's defaults every step takes its memory from the system anew; kept, a LoRA step on a CPU takes 0.8 of the time
# (docs/how-fast.md). Read when Python starts; other systems' allocators ignore it.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000:glibc.malloc.arena_max=1
quickstart: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m experiments quickstart

test: export OPENBLAS_NUM_THREADS ?= 1
test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10 $(TESTS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in build/docs; a warning is an error. Its notebooks show stored outputs, which docs/write_notebooks.py makes.
$(VENV)/.installed-docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch "$@"

docs: $(VENV)/.installed-docs
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

# Wheel and sdist, each installed into an environment of its own on every Python from 3.11 on that this machine has.
dist-check:
	sh .ci/dist-check

# Writes the generated parts of docs/.
tables: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) build dist
