# Every target works on a fresh checkout: the first one called sets up .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
TORCH ?= 2.13.0
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format notebooks base-model lock sz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# Tests the interpreter before anything is written, with a sentence for each way to fail.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON); install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "Setting up $(VENV) from requirements.lock, once: this takes some minutes."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## train the toy world into runs/demo and print the report (goes on where it stopped)
	@$(BIN)/rlhf-kit train --preset toy --output-dir $(DEMO) --resume

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest

lint: $(STAMP) ## check style, spelling and types
	@status=0; \
	for check in "ruff check ." "ruff format --check ." codespell pyright; do \
		echo "== $$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

format: $(STAMP) ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP) ## execute each notebooks/*.py and write its twin .ipynb, with outputs
	@$(BIN)/python -m rlhf_kit.launch $(NOTEBOOKS)

base-model: $(STAMP) ## train the toy world's base model anew
	@$(BIN)/python -m rlhf_kit.toy_world.base_model

# torch pins its CUDA packages exactly in its own metadata; left out here, the lock also fits
# a CPU build of torch.
lock: $(STAMP) ## resolve requirements.lock anew, for Python 3.10 to 3.13
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@echo "torch==$(TORCH)" > $(VENV)/constraints
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev \
		--constraint $(VENV)/constraints --no-annotate --no-header pyproject.toml \
		> $(VENV)/resolved
	@{ echo "# Made by 'make lock'. Exact versions for Python 3.10 to 3.13."; \
		grep '^torch==' $(VENV)/resolved; \
		grep -vE '^((nvidia|cuda|triton)[-=]|torch==)' $(VENV)/resolved; } > requirements.lock

sz: ## count the lines of each file of the library
	@wc -l $$(find rlhf_kit $(wildcard apps) -name '*.py' | sort)

clean: ## delete caches and build products; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
