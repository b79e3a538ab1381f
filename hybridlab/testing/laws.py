"""What holds for every module, mixer or feed-forward, and how laws measure errors."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybridlab.models.parts.init import Module


def distance(got: Tensor, want: Tensor) -> float:
    """Root-mean-square error relative to the root-mean-square of `want`."""
    error, scale = (t.detach().norm() for t in (got.double() - want.double(), want.double()))
    return float(error / scale.clamp(min=1e-30))


class ModuleLaws(ABC):
    @abstractmethod
    def fresh(self) -> Module:
        """A new module, of the same sizes at every call."""

    def test_a_module_built_on_meta_comes_to_life(self) -> None:
        real = self.fresh()
        with torch.device("meta"):
            other = self.fresh()
        assert all(t.is_meta for t in [*other.parameters(), *other.buffers()])
        other.to_empty(device="cpu")
        for t in [*other.parameters(), *other.buffers()]:
            t.detach().fill_(float("nan") if t.is_floating_point() else -77)
        for module in (real, other):
            torch.manual_seed(1)
            module.reset_parameters()
        mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (real, other))
        for name, t in theirs.items():
            assert t.isfinite().all() and torch.equal(t, mine[name]), f"reset_parameters leaves {name}"

    def test_bfloat16_narrows_matrices_and_no_parameter_of_a_module(self) -> None:
        for name, module in self.fresh().to(torch.bfloat16).named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            wide = {t.dtype.itemsize >= 4 for t in own if t.is_floating_point()}
            assert wide <= {isinstance(module, Module)}, f"{name}: {[t.dtype for t in own]}"
