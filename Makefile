PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test lint types setup clean

# Hardens the shipped model with three recipes and measures all four under every attack.
demo: setup
	$(BIN)/crossguard run experiments/demo.toml

test: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	-$(PIP) --no-deps torchattacks==3.5.1  # asks for torchvision, which has no CPU build; its tests skip without it
	touch $@

clean:
	rm -rf $(VENV) runs build dist
