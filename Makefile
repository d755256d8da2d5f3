# Every target is complete on a bare machine with make and Python 3.11 to 3.13: what it needs is installed into .venv
# the first time, and again only when setup.cfg changes. Another Python: make quickstart PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
# One thread a test process: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Each worker begins with a part of its own, so that few fixtures of a module are made twice.
WORKERS := -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-engines test-floor test-fp8 style quality docs bench

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- installation: one stamp file a set of extras --------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make ... PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed-train: setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch and this package into .venv; this happens once and takes a few minutes."
	$(BIN)/python -m pip install --disable-pip-version-check torch torchvision
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[train]'
	@touch $@

.venv/installed-dev: .venv/installed-train
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[train,dev]'
	@touch $@

.venv/installed-docs: .venv/installed-train
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[train,docs]'
	@touch $@

install: .venv/installed-train  ## Install the package into .venv with all that training needs

# ---- first steps -----------------------------------------------------------------------------------------------------

# Layers this small wait for their threads thousands of times a step. With a short spin before they sleep a step takes as long
# as by default on two idle cores (300 of 310 images/s), and half as long while another program is busy (180 instead of 100).
quickstart: export GOMP_SPINCOUNT = 2000
quickstart: .venv/installed-train  ## Train a tiny ViT on digits (or DATA=folder) and make a picture of what it learnt
	$(BIN)/python training_scripts/pretrain.py quickstart_digits --output_dir runs/quickstart $(if $(DATA),--train_data "$(DATA)")
	$(BIN)/dinov3-hf visualize pca runs/quickstart/teacher "$(or $(DATA),digits)" -o runs/quickstart/pca.png
	@echo
	@echo "Look at runs/quickstart/pca.png, then try:"
	@echo "  $(BIN)/dinov3-hf evaluate knn runs/quickstart/teacher --data digits"
	@echo "  $(BIN)/dinov3-hf visualize similarity runs/quickstart/teacher YOUR_IMAGE.png -o similarity.png"
	@echo "  $(BIN)/accelerate launch training_scripts/pretrain.py quickstart_digits --train_data YOUR_FOLDER --output_dir runs/mine"

# ---- development -----------------------------------------------------------------------------------------------------

test: .venv/installed-dev  ## Run the fast tests (CPU, offline, minutes)
	$(PYTEST) $(WORKERS) -m "not slow"

test-all: .venv/installed-dev  ## Run every test that this machine can run
	$(PYTEST) $(WORKERS)

test-engines: .venv/installed-dev  ## Run the real scripts under every engine, on several processes
	$(PYTEST) -m slow tests/distributed/test_engines.py tests/distributed/test_distillation.py \
		tests/scripts/test_engines.py tests/scripts/test_distill.py

# The oldest supported transformers stands in front of the newest on the path; torch and the rest are shared.
build/floor/installed: setup.cfg | .venv/installed-dev
	rm -rf build/floor
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --target build/floor 'transformers==5.8.*'
	@touch $@

test-floor: build/floor/installed  ## Run the model, trainer and command-line tests on the oldest supported transformers
	PYTHONPATH=$(CURDIR)/build/floor $(PYTEST) $(WORKERS) -m "not slow" tests/models tests/training tests/evals tests/cli \
		tests/test_auto.py tests/test_package.py

# Beside the environment: torchao prints warnings of its own wherever transformers finds it.
build/fp8/installed: setup.cfg | .venv/installed-dev
	rm -rf build/fp8
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target build/fp8 'torchao>=0.18'
	@touch $@

test-fp8: build/fp8/installed  ## Run the tests of float8 training, which need torchao
	PYTHONPATH=$(CURDIR)/build/fp8 $(PYTEST) -m "not slow" tests/training/test_memory.py

style: .venv/installed-dev  ## Format the code and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/installed-dev  ## Check style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos

docs: .venv/installed-docs  ## Build the documentation into docs/_build
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build
	@echo "docs/_build/index.html"

bench: .venv/installed-dev  ## Run the benchmarks
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done
