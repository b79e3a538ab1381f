"""Whether a version with no record on a kind of device computes right on the one at hand: tried once per process."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hybridlab.kernels.op import Op

CEILING = {torch.float32: (1e-5, 2e-5)}  # relative error of outputs and of gradients; of narrower dtypes:
NARROW = (5e-3, 1e-2)
_log = logging.getLogger("hybridlab.kernels")
_found: dict[tuple, str | None] = {}


def disagreement(op: "Op", version: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """How `version` differs from the definition on a call like this one's dtype and device, or None.

    A packed case and a cut of the real one, values and all gradients, against float64. One that raises differs too.
    While torch.compile traces nothing is tried: what was found before counts, and what is not known passes.
    """
    like = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    key = (op.name, version, like.device, like.dtype)
    if key not in _found and not torch.compiler.is_compiling():
        try:
            _found[key] = _try(op, version, like.device, like.dtype)
        except Exception as error:  # a compiler's or a driver's, of any kind: other versions remain
            _found[key] = f"it raised {type(error).__name__}: {str(error)[:300]}"
        if _found[key]:
            _log.warning("%s: version %r is not used on %s in %s: %s", op.name, version, *key[2:], _found[key])
    return _found.get(key)


def _try(op: "Op", version: str, device: torch.device, dtype: torch.dtype) -> str | None:
    for case in (op.cases["packed"], op.cases["real"] | {"batch": 1, "time": 200}):
        generator = torch.Generator().manual_seed(0)
        args = op.make(case, device, dtype, generator)
        wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in args.items()}
        with torch.no_grad():
            upstream = [torch.randn(out.shape, generator=generator) for out in op.reference(**args)]
        truth, ours = (_values(run, a, upstream) for run, a in ((op.reference, wide), (op.get(version), args)))
        for name, right in truth.items():
            lost = ((ours[name].double() - right).norm() / right.norm().clamp(min=1e-30)).item()
            if not lost <= CEILING.get(dtype, NARROW)[name.startswith("d_")]:
                return f"{name} is off by {lost:.1e} in {case}"
    return None


def _values(run: Callable[..., Any], args: dict[str, Any], upstream: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    floating = [n for n, x in args.items() if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = [args[name].detach().clone().requires_grad_() for name in floating]
    with torch.enable_grad():
        outs = run(**args | dict(zip(floating, leaves, strict=True)))
        weights = [w.to(out.device, out.dtype) for out, w in zip(outs, upstream, strict=True)]
        grads = torch.autograd.grad(outs, leaves, weights, allow_unused=True, materialize_grads=True)
    named = {f"d_{name}": grad for name, grad in zip(floating, grads, strict=True)}
    return {f"output {i}": out.detach() for i, out in enumerate(outs)} | named
