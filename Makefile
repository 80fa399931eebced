# Every target makes what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPEAT ?= 1
SEEDS ?= 0..5000
CHAOS := tests/chaos tests/processes/test_demo_kills.py tests/processes/test_resume.py
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test lint format dashboard bench simulate chaos long stress clean

install: $(STAMP)

# torch first and alone: pip then finds it installed and pulls no other build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/swarmnode demo $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_sizes.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dashboard: install
	$(BIN)/python dashboard/generate.py

bench: install
	$(BIN)/python benchmarks/transport.py

simulate: install
	$(BIN)/swarmnode simulate examples/scenarios/faults.toml --seeds $(SEEDS) --jobs 2 $(ARGS)

# All faults on real processes; REPEAT=20 does them so many times in a row.
chaos: install
	for number in $$(seq $(REPEAT)); do \
	  $(BIN)/python -m pytest $(CHAOS) -m long $(ARGS) || exit; done

# Every other test that `make test` leaves out: codecs on many random inputs, and under kills.
long: install
	$(BIN)/python -m pytest $(addprefix --ignore=,$(CHAOS)) -m long $(ARGS)

# Ten minutes of kills, one every two seconds; fails if a step is lost, or memory, files or disk grow.
stress: install
	$(BIN)/python benchmarks/stress.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
