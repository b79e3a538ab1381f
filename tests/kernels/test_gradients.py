"""R12: analytic gradients equal finite differences in float64, states and packing included."""

from functools import partial

import pytest
import torch

from hybridlab.kernels.ops import OPS

SMALL = dict(batch=1, time=5, heads=2, groups=1, key=2, value=2, d_model=2, n=2, width=3)
RUNS = [(op, case) for op in OPS for case in op.cases if case not in ("long", "real")]


@pytest.mark.parametrize("op, case", RUNS, ids=lambda x: getattr(x, "name", x))
def test_gradients_equal_finite_differences(lab, op, case):
    case = op.cases[case]
    case = case | {name: min(size, case[name]) for name, size in SMALL.items() if name in case}
    if case.get("docs"):
        case = case | dict(docs=(2, 0, 3))
    if "rows" in case:
        case = case | dict(rows=(2, 0, 1), k=2, n=2)
    args = lab.make(op, case)
    leaves = {n: x.requires_grad_() for n, x in args.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    for version in ("reference", *op.versions):
        if op.unavailable(version, **args):
            continue
        options = [{}, {"chunk": 2}] if version == "chunked" and op.name != "causal_conv" else [{}]
        for option in options:
            run = partial(call, op.get(version), args | option, list(leaves))
            assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=bool(option))


def call(fn, args, names, *leaves):
    return fn(**args | dict(zip(names, leaves, strict=True)))
