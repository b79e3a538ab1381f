"""How modules come to life: dtype of own parameters, and initial values."""

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn


class Module(nn.Module):
    """A module whose own parameters and buffers (not its children's) never become narrower than float32.

    `__init__` only allocates; `reset_parameters` fills every parameter and buffer below, so that a model built on the
    meta device comes to life by `to_empty` and `reset_parameters`.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(lambda t: _at_least_float32(fn, t), recurse=False)

    def reset_parameters(self) -> None:
        """Fill everything below; override, call super, then fill the module's own parameters."""
        reset_children(self)


def count(module: nn.Module) -> int:
    """Numbers in all parameters below."""
    return sum(p.numel() for p in module.parameters())


def _at_least_float32(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    moved = fn(t)
    narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4
    return t.to(moved.device) if narrowed else moved


@torch.no_grad()
def reset_children(module: nn.Module) -> None:
    """Fill the parameters of every child: linear layers with variance 1 / fan-in, all others by their own rule."""
    for child in module.children():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=child.in_features**-0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential | nn.Identity):
            reset_children(child)
        else:
            cast(Module, child).reset_parameters()
