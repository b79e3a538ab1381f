"""What a kernel is: one definition in plain torch, and any number of faster versions that must agree with it."""

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridlab.kernels.draw import Draw
from hybridlab.kernels.trial import disagreement
from hybridlab.kernels.triton_launch import interpreted

Case = dict[str, Any]  # sizes and options by name, e.g. dict(batch=2, time=63, heads=3, key=64)
Outputs = tuple[Tensor, ...]

_log = logging.getLogger("hybridlab.kernels")
_said: set[tuple[str, str]] = set()
_loaded: dict[tuple[str, str], Callable[..., Any]] = {}  # by `lazy`
VARIABLE = "HYBRIDLAB_KERNELS"  # e.g. "selective_scan=reference,delta_rule=chunked"


def accepts_all(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Version:
    """One way to compute an op.

    run             same signature as the definition
    refuses         same signature -> why this call cannot be served here (values included), or None
    device          where it runs, if not everywhere. Of "cuda", Triton kernels, a CPU runs those that are asked for by
                    name, in Triton's interpreter
    flops           case -> forward FLOPs that its matmuls execute, where that differs from the definition's
    untried         no record shows it on its device: `auto` takes it after a trial there (kernels/trial.py)
    row_invariant   rows of the result are bitwise independent of how many other rows there are
    ordered         needs programs in order, or atomics: GPU-only and never picked by `auto`
    """

    run: Callable[..., Outputs]
    refuses: Callable[..., str | None] = accepts_all
    device: str | None = None
    flops: Callable[[Case], int] | None = None
    untried: bool = False
    row_invariant: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class Op:
    """A definition, its versions in order of preference, and the sizes that tests check and benchmarks time.

    check   same signature -> None; raises ValueError on arguments that no version may serve
    draw    (case, Draw) -> arguments by name; floating tensors are differentiable inputs
    formula case -> forward FLOPs of the mathematics, 2 per multiply-add
    """

    name: str
    reference: Callable[..., Outputs]
    versions: Mapping[str, Version]
    cases: Mapping[str, Case]  # by name: tiny, irregular, long, real
    draw: Callable[[Case, Draw], dict[str, Any]]
    formula: Callable[[Case], int]
    check: Callable[..., Any] = accepts_all

    def __call__(self, *args: Any, version: str = "auto", **kwargs: Any) -> Outputs:
        """Run the first version that accepts the call, or the one named by `version` or by HYBRIDLAB_KERNELS.

        Raises ValueError when the arguments do not fit, and when the version is unknown or refuses the call. Autocast
        does not reach inside: an op computes as its definition says.
        """
        self.check(*args, **kwargs)
        version = _forced().get(self.name, "auto") if version == "auto" else version
        if version == "auto":
            version = self._pick(args, kwargs)
        elif why := self.unavailable(version, *args, **kwargs):
            raise ValueError(f"{self.name}: version={version!r} refuses this call: {why}")
        with outside_autocast(_device(args, kwargs)):
            return self.get(version)(*args, **kwargs)

    def get(self, version: str) -> Callable[..., Outputs]:
        """The function of one version; "reference" is the definition."""
        return self._version(version).run

    def unavailable(self, version: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `version` cannot serve this call, or None."""
        found, where = self._version(version), _device(args, kwargs)
        by_name = found.device == "cuda" and where == "cpu" and interpreted()
        if found.device not in (None, where) and not by_name:
            hint = ", or TRITON_INTERPRET=1" if found.device == "cuda" else ""
            return f"tensors are on {where}; it needs {found.device}{hint}"
        return found.refuses(*args, **kwargs)

    def make(self, case: Case, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator) -> dict:
        """Random arguments by name."""
        return self.draw(case, Draw(device, dtype, generator))

    def flops(self, case: Case, version: str = "reference") -> int:
        """Forward FLOPs: of the mathematics, or what the matmuls of a version execute."""
        return (self._version(version).flops or self.formula)(case)

    def bytes(self, case: Case, dtype: torch.dtype) -> int:
        """What one fused forward pass must read and write: the arguments and outputs of a run on a CPU."""
        args = self.make(case, "cpu", dtype, torch.Generator())
        return sum(x.nbytes for x in (*args.values(), *self(**args)) if isinstance(x, Tensor))

    def _version(self, name: str) -> Version:
        if name == "reference":
            return Version(self.reference)
        if name not in self.versions:
            raise ValueError(f"{self.name} has no version {name!r}; it has {['reference', *self.versions]}")
        return self.versions[name]

    def _pick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The first version that accepts the call, else the definition; says so once."""
        where, refusals = _device(args, kwargs), []
        here = [name for name, v in self.versions.items() if not v.ordered and v.device in (None, where)]
        for name in (*here, "reference"):
            why = self.unavailable(name, *args, **kwargs)
            if why is None and self._version(name).untried:
                why = disagreement(self, name, args, kwargs)
            if why is None:
                break
            refusals.append(f"{name} refused: {why}")
        if (self.name, name) not in _said and not torch.compiler.is_compiling():
            _said.add((self.name, name))
            _log.info("%s runs as %r (%s)", self.name, name, "; ".join(refusals) or "first choice")
        return name


def outside_autocast(device: str) -> AbstractContextManager:
    """Where autocast does not reach; costs nothing where there is none, as entering its context does."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def lazy(module: str, name: str) -> Callable[..., Any]:
    """A function whose module, which needs triton or a compiler, is imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if (module, name) not in _loaded:
            _load(module, name)
        return _loaded[module, name](*args, **kwargs)

    return call


def _load(module: str, name: str) -> bool:
    _loaded[module, name] = getattr(importlib.import_module(module), name)
    return True


# what torch.compiler.assume_constant_result sets, without importing the compiler, which then runs `_load` as it is
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _forced() -> dict[str, str]:
    """HYBRIDLAB_KERNELS="op=version,op=version" as a dict."""
    text = os.environ.get(VARIABLE, "")
    pairs = [item.split("=") for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{VARIABLE}={text!r}: write op=version,op=version")
    return {op.strip(): version.strip() for op, version in pairs}
