# `make run` shows the main job, `make test` runs the tests; both build .venv first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

FLOWER := .venv-flower/bin

.PHONY: test-pilot test-flower run test test-full lint fuzz clean
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
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,nvflare,sql,web,tensorboard,mlflow]'
	touch $@

# Faults and intrusions of a deployment over real processes: kill -9, full disks, cut lines, other authorities. Half an hour.
test-pilot: .venv/.ready-dev
	PRIVFED_PILOT=1 $(BIN)/pytest $(addprefix tests/privfed/deployment/test_,faults.py troubles.py intrusions.py)

# The engines' suite and masked rounds over a Flower federation: TLS, signed node keys, real processes. A quarter of an hour.
test-flower: .venv-flower/.ready
	PRIVFED_FLOWER=1 $(FLOWER)/pytest -k "not nvflare and not local" tests/privfed/engines tests/privfed/deployment/test_flower.py

# Flower wants older parts than constraints.txt has: an environment of its own.
.venv-flower/.ready: pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv .venv-flower
	$(FLOWER)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints-flower.txt)
	$(FLOWER)/pip install --quiet --disable-pip-version-check -c constraints-flower.txt -e '.[flower]' hypothesis pytest
	touch $@

# Ten minutes of coverage-guided fuzzing of every decoder and machine of crypto/.
fuzz: .venv/.ready-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz_crypto.py --seconds 600

clean:
	rm -rf .venv .venv-flower build *.egg-info
