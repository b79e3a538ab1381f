"""Triton's interpreter runs the programs of a launch one after another; here, in an order of our choice.

A GPU promises no order. Results that change with it tell of two programs that store, or store and load, the same place.
"""

import random

import pytest
import torch

ORDERS = ("given", "reversed", "shuffled")


def reorder(order, seed=0):
    """From now on program i of every launch computes as program p(i), p a permutation of the launch's grid."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def set_grid_dim(*sizes):
        builder.grid_dim = sizes
        programs = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])]
        if order == "shuffled":
            random.Random(seed).shuffle(programs)
        turn = iter(programs[::-1] if order == "reversed" else programs)
        builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", next(turn))

    builder.set_grid_dim = set_grid_dim


@pytest.fixture
def program_order():
    """`program_order("reversed")`, "shuffled" (of a seed) or "given": how launches run until the test ends."""
    from triton.runtime.interpreter import interpreter_builder as builder

    yield reorder
    for name in ("set_grid_dim", "set_grid_idx"):
        builder.__dict__.pop(name, None)


@pytest.fixture
def in_any_order(program_order):
    """`in_any_order(run)` -> the tensors by name that run() gives, after every order has given the same bits.

    Memory that a kernel is handed to fill holds NaN, so that a place no program stores shows too.
    """

    def check(run):
        results = {}
        torch.use_deterministic_algorithms(True)
        try:
            for order in ORDERS:
                program_order(order)
                results[order] = run()
        finally:
            torch.use_deterministic_algorithms(False)
        first = results["given"]
        for order, result in results.items():
            for name, value in result.items():
                assert not value.isnan().any(), f"{name} holds NaN: some place is never stored"
                assert torch.equal(value, first[name]), f"{name} differs when programs run {order}"
        return first

    return check
