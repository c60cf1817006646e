# `make run` shows the main job, `make test` runs the tests; both build .venv first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: test-pilot run test test-full lint fuzz clean
run: .venv/.ready
	$(BIN)/privfed run

test: .venv/.ready-dev
	$(BIN)/pytest -n 2

# Every method under every unit, noise, engine and aggregation, where `test` has each two of them once; ten minutes more.
test-full: .venv/.ready-dev
	$(BIN)/pytest -n 2 --full

lint: .venv/.ready-dev
	$(BIN)/ruff check privfed privacy crypto benchmarks tests
	$(BIN)/ruff format --check privfed privacy crypto benchmarks tests
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and by exact version: a resolver left alone may fetch several GB of CUDA packages.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "privfed needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.ready-dev: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,nvflare,sql]'
	touch $@

# Faults and intrusions of a deployment over real processes: kill -9, full disks, cut lines, other authorities. Half an hour.
test-pilot: .venv/.ready-dev
	PRIVFED_PILOT=1 $(BIN)/pytest $(addprefix tests/privfed/deployment/test_,faults.py troubles.py intrusions.py)

# Ten minutes of coverage-guided fuzzing of every decoder and machine of crypto/.
fuzz: .venv/.ready-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz_crypto.py --seconds 600

clean:
	rm -rf .venv build *.egg-info
