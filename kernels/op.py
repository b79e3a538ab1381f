"""What a kernel is: one definition in plain torch, and any number of faster versions that must agree with it."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]  # sizes and options by name, e.g. dict(batch=2, time=63, heads=3, key=64)
Outputs = tuple[Tensor, ...]

_log = logging.getLogger("hybridlab.kernels")
_said: set[tuple[str, str]] = set()
VARIABLE = "HYBRIDLAB_KERNELS"  # e.g. "selective_scan=reference,delta_rule=chunked"


def accepts_all(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Version:
    """One way to compute an op.

    run             same signature as the definition
    refuses         same signature -> why this call cannot be served here (values included), or None
    row_invariant   rows of the result are bitwise independent of how many other rows there are
    ordered         needs programs in order, or atomics: GPU-only and never picked by `auto`
    """

    run: Callable[..., Outputs]
    refuses: Callable[..., str | None] = accepts_all
    row_invariant: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class Op:
    """A definition, its versions in order of preference, and the sizes that tests check and benchmarks time.

    check   same signature -> None; raises ValueError on arguments that no version may serve
    make    (case, device, dtype, generator) -> arguments by name; floating tensors are differentiable inputs
    flops   case -> forward FLOPs of the mathematics, 2 per multiply-add
    bytes   (case, dtype) -> bytes that one fused forward pass must read and write
    """

    name: str
    reference: Callable[..., Outputs]
    versions: Mapping[str, Version]
    cases: Mapping[str, Case]  # by name: tiny, irregular, long, real
    make: Callable[[Case, torch.device | str, torch.dtype, torch.Generator], dict[str, Any]]
    flops: Callable[[Case], int]
    bytes: Callable[[Case, torch.dtype], int]
    executed_flops: Mapping[str, Callable[[Case], int]] = field(default_factory=dict)
    check: Callable[..., Any] = accepts_all

    def __call__(self, *args: Any, version: str = "auto", **kwargs: Any) -> Outputs:
        """Run the first version that accepts the call, or the one named by `version` or by HYBRIDLAB_KERNELS.

        Raises ValueError when the arguments do not fit, and when the version is unknown or refuses the call. Autocast
        does not reach inside: an op computes as its definition says.
        """
        self.check(*args, **kwargs)
        if version == "auto":
            version = _forced().get(self.name, "auto")
        if version == "auto":
            version = self._pick(args, kwargs)
        elif why := self.unavailable(version, *args, **kwargs):
            raise ValueError(f"{self.name}: version={version!r} refuses this call: {why}")
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return self.get(version)(*args, **kwargs)

    def get(self, version: str) -> Callable[..., Outputs]:
        """The function of one version; "reference" is the definition."""
        if version == "reference":
            return self.reference
        if version not in self.versions:
            raise ValueError(f"{self.name} has no version {version!r}; it has {['reference', *self.versions]}")
        return self.versions[version].run

    def unavailable(self, version: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `version` cannot serve this call, or None."""
        self.get(version)
        return None if version == "reference" else self.versions[version].refuses(*args, **kwargs)

    def _pick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        refusals: dict[str, str] = {}
        for name, version in self.versions.items():
            if version.ordered:
                continue
            if (why := version.refuses(*args, **kwargs)) is None:
                self._say(name, refusals)
                return name
            refusals[name] = why
        self._say("reference", refusals)
        return "reference"

    def _say(self, version: str, refusals: Mapping[str, str]) -> None:
        if (self.name, version) not in _said and not torch.compiler.is_compiling():
            _said.add((self.name, version))
            why = "; ".join(f"{name} refused: {reason}" for name, reason in refusals.items()) or "first choice"
            _log.info("%s runs as %r (%s)", self.name, version, why)


def _forced() -> dict[str, str]:
    """HYBRIDLAB_KERNELS="op=version,op=version" as a dict."""
    text = os.environ.get(VARIABLE, "")
    pairs = [item.split("=") for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{VARIABLE}={text!r}: write op=version,op=version")
    return {op.strip(): version.strip() for op, version in pairs}
