# One virtual environment, made once and again whenever pyproject.toml changes.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
# Tests are many small tensors: one thread per process, one process per core.
QUIET  := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: train test check check-long lint bench oracles clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

train: $(VENV)/installed
	$(BIN)/python train.py +config=hybrid_small

test: $(VENV)/installed
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p hybridlab

check: lint test

check-long: check
	$(QUIET) $(BIN)/python -m pytest -m long --durations=15

bench: $(VENV)/installed
	$(BIN)/python -m pytest tests/benchmarks --sizes=real

# Published code, run once more; the tests compare with the numbers it leaves. Needs the network.
oracles: $(VENV)/installed
	$(QUIET) $(BIN)/python tests/oracles/make.py

clean:
	rm -rf $(VENV)
