"""How every kernel test runs an op: on leaves, with given upstream gradients, to values and gradients by name."""

from types import SimpleNamespace

import pytest
import torch


def cast(args, dtype):
    return {n: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in args.items()}


def strided(x):
    """The same values in a layout whose last axis is not the contiguous one."""
    return x if x.dim() < 2 else x.mT.contiguous().mT


def evaluate(fn, args, upstream, strange=False):
    """Outputs (out0, out1) and gradients (dq, dstate ...) in float64; a gradient that never arrives is zero."""
    leaves = dict(args)
    for name, x in args.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = strided(x) if strange else x
            leaves[name] = x.detach().clone().requires_grad_()
    outs = fn(**leaves)
    grads = [strided(w.to(o.dtype)) if strange else w.to(o.dtype) for o, w in zip(outs, upstream, strict=True)]
    pairs = [(o, w) for o, w in zip(outs, grads, strict=True) if o.requires_grad]  # not of no tokens
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    got = {f"out{i}": o.detach().double() for i, o in enumerate(outs)}
    for name, x in leaves.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            got[f"d{name}"] = torch.zeros_like(x).double() if x.grad is None else x.grad.double()
    return got


def draw_upstream(op, args, seed):
    """One random gradient per output, rounded to the dtype in which it will arrive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outs = op.reference(**args)
    return [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype).double() for o in outs]


def error(got, truth):
    """Relative error in the root-mean-square sense."""
    return ((got - truth).norm() / truth.norm().clamp(min=1e-30)).item() if truth.numel() else 0.0


def make(op, case, dtype=torch.float64, seed=0):
    return op.make(case, "cpu", dtype, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def lab():
    names = (cast, strided, evaluate, draw_upstream, error, make)
    return SimpleNamespace(**{f.__name__: f for f in names})
