# make demo    from nothing to a hybrid run on four ranks, over the curve of one process
# make test    ruff, mypy and pytest
# make chaos   a hundred runs that lose a rank at a random moment, studies that are killed, lost hosts, jobs of Slurm
# make lint    the first two · make format · make bench · make clean
#
# Everything runs in .venv, which is made once from pyproject.toml and constraints.txt. Another Python: PYTHON=python3.12.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# The tests start many small ranks: more threads than one a rank only make them wait for each other.
test bench chaos: export OMP_NUM_THREADS := 1

.PHONY: demo test chaos lint format bench clean
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

chaos: $(INSTALLED)
	$(BIN)/python -m tests.faults.chaos --runs 100
	$(BIN)/python -m tests.tuning.kills --kills 60
	$(BIN)/python -m pytest tests/faults/stopped_group.py tests/tuning/population_layouts.py tests/tuning/two_hosts.py
	$(BIN)/python -m tests.faults.two_hosts || test $$? = 77
	$(BIN)/python -m tests.faults.slurm_jobs || test $$? = 77

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.context
	$(BIN)/python -m benchmarks.bubble
	$(BIN)/python -m benchmarks.schedules
	$(BIN)/python -m benchmarks.health
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.balance
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.input
	$(BIN)/python -m benchmarks.transfer
	$(BIN)/python -m benchmarks.widths
	$(BIN)/python -m benchmarks.tuning

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: '$(PYTHON)' is missing or older than Python 3.10. Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv) or name one: make PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' can't make a virtual environment. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
