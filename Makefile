PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Loads what the commands load, so that its byte code is there also where Python may not write any later; compiling all that
# is installed takes four times as long.
COMPILE := PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import accelerate, matplotlib.figure, torch.utils.tensorboard, \
	crossguard.cli; [getattr(crossguard, name) for name in dir(crossguard)]; crossguard.Tiny().encode_text(['a'])"
# For the tests alone, and beside the environment: there is no torchvision for the CPU build of torch, and transformers would take
# the one for GPUs for a whole one. The tests declare what it lacks (tests/open_clips.py), or skip where it is not there.
OPEN_CLIP := open_clip_torch==3.3.0 timm==1.0.31 ftfy==6.3.1 wcwidth==0.9.4 torchvision==0.28.0
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -r s --durations=25 --durations-min=1

.PHONY: demo test test-all checks lint types pytest setup clean

# Hardens the shipped model with three recipes and measures all four under every attack. Two processes share the grid, each on
# one thread: threads of one process would mostly wait for each other, since the networks are small.
demo: setup
	export OMP_NUM_THREADS=1; $(BIN)/crossguard run experiments/demo.toml >/dev/null 2>&1 & \
	export OMP_NUM_THREADS=1; $(BIN)/crossguard run experiments/demo.toml && wait

# Linters, types and tests, each on its own, so that two cores are busy to the end.
test: $(VENV)/.ready-dev
	$(MAKE) --no-print-directory --jobs=3 lint types pytest

# The same, and the long runs of what the quick tests check too.
test-all: test
	$(PYTEST) -m slow

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/basedpyright

pytest: $(VENV)/.ready-dev
	$(PYTEST)

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	$(COMPILE)
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	-$(PIP) --no-deps torchattacks==3.5.1  # asks for torchvision, which has no CPU build; without it its tests skip
	-$(PIP) --no-deps --target $(VENV)/open_clip $(OPEN_CLIP)
	touch $@

clean:
	rm -rf $(VENV) runs build dist
