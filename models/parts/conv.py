"""Short causal convolution along time, the same function in training, prefill and step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.kernels.causal_conv import causal_conv
from hybridlab.kernels.causal_conv.step import advance
from hybridlab.models.parts.init import Module
from hybridlab.packing import Packing


class ShortConv(Module):
    """Depthwise convolution over the last `width` tokens, then SiLU or not. Its state is the last width - 1 inputs."""

    def __init__(self, dim: int, *, width: int = 4, bias: bool = False, silu: bool = True):
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution of width={width} sees no token; give at least 1")
        self.dim, self.width, self.silu = dim, width, silu
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv1d: uniform within 1 / sqrt(width)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.width**-0.5), self.width**-0.5)

    def forward(self, x: Tensor, state: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """x [batch, time, dim] -> y of the same shape, and the state [batch or docs, width - 1, dim] after it."""
        y, state = causal_conv(x, self.weight, self.bias, state, packing and packing.offsets, silu=self.silu)
        return y, state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, x [batch, dim], without the op's choices and checks."""
        return advance(x, self.weight, self.bias, state, self.silu)


class NoConv(Module):
    """SiLU in the place of a ShortConv, for mixers that can do without one; its state holds no tokens."""

    width = 1

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, state: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """Shapes as in ShortConv, with width 1."""
        rows = len(x) if packing is None else len(packing.offsets) - 1
        empty = x.new_empty(rows, 0, self.dim, dtype=torch.promote_types(x.dtype, torch.float32))
        return F.silu(x), empty if state is None else state


def short_conv(dim: int, width: int | None) -> ShortConv | NoConv:
    """A ShortConv without bias, or none where width is None."""
    return NoConv(dim) if width is None else ShortConv(dim, width=width)
