"""Short causal convolution along time, the same function in training, prefill and step."""

import torch
from torch import Tensor, nn

from hybridlab.kernels.causal_conv import causal_conv
from hybridlab.models.parts.init import Module
from hybridlab.packing import Packing


class ShortConv(Module):
    """Depthwise convolution over the last `width` tokens, then SiLU. Its state is the last width - 1 inputs."""

    def __init__(self, dim: int, *, width: int = 4, bias: bool = False):
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution of width={width} sees no token; give at least 1")
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv1d: uniform within 1 / sqrt(width)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.width**-0.5), self.width**-0.5)

    def forward(self, x: Tensor, state: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """x [batch, time, dim] -> y of the same shape, and the state [batch or docs, width - 1, dim] after it."""
        y, state = causal_conv(x, self.weight, self.bias, state, packing and packing.offsets, silu=True)
        return y, state
