"""How every kernel test runs an op: on leaves, with given upstream gradients, to values and gradients by name."""

import inspect
import os
from types import SimpleNamespace

import pytest
import torch


def hasten_interpreter():
    """Triton's interpreter searches all of `triton.language` for what it replaces, at every call: search once."""
    import triton.language as tl
    from triton.runtime import interpreter

    found = {}

    def patch_builtin(package, builder, scope):
        if package not in found:
            found[package] = [pair for pair in inspect.getmembers(package) if tl.core.is_builtin(pair[1])]
        if found[package] and not tl.core.is_builtin(getattr(package, found[package][0][0])):
            return  # it is replaced already
        for name, member in found[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    if [*inspect.signature(interpreter._patch_builtin).parameters] == ["pkg", "builder", "scope"]:
        interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1":
    hasten_interpreter()


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
    drawn = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outs]
    return [w.to(o.device, o.dtype).double() for w, o in zip(drawn, outs, strict=True)]


def error(got, truth):
    """Relative error in the root-mean-square sense."""
    return ((got - truth).norm() / truth.norm().clamp(min=1e-30)).item() if truth.numel() else 0.0


def make(op, case, dtype=torch.float64, seed=0, device="cpu"):
    return op.make(case, device, dtype, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def lab():
    names = (cast, strided, evaluate, draw_upstream, error, make)
    return SimpleNamespace(**{f.__name__: f for f in names})
