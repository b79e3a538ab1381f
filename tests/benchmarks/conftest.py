"""Benchmarks run each case once at tiny size under plain pytest; `--sizes=real` times the sizes that count."""

import os

import pytest

VARIABLE = "HYBRIDLAB_SIZES"  # what the flag sets


def pytest_addoption(parser):
    parser.addoption("--sizes", choices=("tiny", "real"), help="tiny: each case once; real: timed")


def pytest_configure(config):
    os.environ[VARIABLE] = config.getoption("--sizes") or os.environ.get(VARIABLE, "tiny")


@pytest.fixture
def sizes():
    return os.environ[VARIABLE]


@pytest.fixture
def timed(benchmark, sizes):
    """Call a function: timed by rounds at real sizes, once at tiny ones."""

    def run(fn):
        return benchmark.pedantic(fn, rounds=5 if sizes == "real" else 1, warmup_rounds=1 if sizes == "real" else 0)

    return run
