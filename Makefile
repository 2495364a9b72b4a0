# Every target works on a fresh checkout: the first one called sets up .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
TORCH ?= 2.13.0
LOCK ?=
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.py notebooks/solutions/[0-9]*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format notebooks base-model audit lock sz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# Tests the interpreter before anything is written, with a sentence for each way to fail.
# A CPU build of torch needs requirements.lock; any other may bring CUDA packages, which pip takes
# in only where the lock has their hashes.
$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON); install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) --dry-run --no-deps --ignore-installed --report $(VENV)/torch.json torch==$(TORCH)
	@lock=$(LOCK); \
	if [ -z "$$lock" ]; then lock=requirements-cuda.lock; \
		! grep -qF '"version": "$(TORCH)+cpu"' $(VENV)/torch.json || lock=requirements.lock; fi; \
	echo "Setting up $(VENV) from $$lock, once: this takes some minutes."; \
	$(PIP) --require-hashes -r $$lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## train the toy world into runs/demo and print the report (goes on where it stopped)
	@$(BIN)/rlhf-kit train --preset toy --output-dir $(DEMO) --resume

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

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

audit: $(STAMP) ## look up every locked package among the known vulnerabilities (asks the network)
	@$(BIN)/pip-audit --strict --disable-pip --progress-spinner off -r requirements-cuda.lock || { \
		echo "error: the audit did not pass: a package has a known vulnerability, or the advisory service could not be asked about it (see above)" >&2; exit 1; }

# One resolution, two files: requirements-cuda.lock has all of it; requirements.lock leaves out
# what only CUDA builds of torch need (not Triton, which the tests interpret), and has the CPU
# build of this machine's Python alone: beside
# it pip would prefer the index's builds, whose hashes it knows beforehand.
lock: $(STAMP) ## resolve both locks anew, for Python 3.10 to 3.13
	@echo "torch==$(TORCH)" > $(VENV)/constraints
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras \
		--constraint $(VENV)/constraints --generate-hashes --no-annotate --no-header \
		pyproject.toml > $(VENV)/resolved
	@$(PIP) --dry-run --no-deps --ignore-installed --report $(VENV)/torch.json torch==$(TORCH)
	@grep -qF '"version": "$(TORCH)+cpu"' $(VENV)/torch.json || { echo "error: pip chooses no CPU build of torch $(TORCH) here; make the locks where it does" >&2; exit 2; }
	@{ echo "# Made by 'make lock': everything, CUDA packages too. Python 3.10 to 3.13."; \
		cat $(VENV)/resolved; } > requirements-cuda.lock
	@{ echo "# Made by 'make lock', for CPU builds of torch. Python 3.10 to 3.13."; \
		hash=$$(grep -oE '"sha256": "[0-9a-f]{64}"' $(VENV)/torch.json | cut -d'"' -f4); \
		printf 'torch==$(TORCH)+cpu \\\n    --hash=sha256:%s\n' $$hash; \
		awk '/^[a-z]/ { keep = !/^(nvidia|cuda|torch)[-=]/ } keep' $(VENV)/resolved; \
	} > requirements.lock

sz: ## count the lines of each file of the library
	@wc -l $$(find rlhf_kit $(wildcard apps) -name '*.py' | sort)

clean: ## delete caches and build products; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
