"""Dense feed-forward layers: y = W_down act(W_up x)."""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.models.ffn.base import NOTHING, Extras, FeedForward


class Dense(FeedForward):
    """Up, activation, down, without biases.

    d_hidden   None means about the parameters of a plain layer of 4 · d_model, rounded up to a multiple of 64
    """

    branches: ClassVar[int]  # 2 if the activation multiplies two vectors of d_hidden, else 1
    nonlinearity: ClassVar[Callable[[Tensor], Tensor]]

    def __init__(self, d_model: int, *, d_hidden: int | None = None):
        super().__init__()
        if d_hidden is None:
            d_hidden = -(-8 * d_model // (self.branches + 1) // 64) * 64
        if d_model < 1 or d_hidden < 1:
            raise ValueError(f"d_model={d_model} and d_hidden={d_hidden} must be positive")
        self.d_model, self.d_hidden = d_model, d_hidden
        self.up = nn.Linear(d_model, self.branches * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)
        self.reset_parameters()

    @classmethod
    def act(cls, u: Tensor) -> Tensor:  # [..., branches · d_hidden] -> [..., d_hidden]
        first, *other = u.chunk(cls.branches, dim=-1)
        return cls.nonlinearity(first) * other[0] if other else cls.nonlinearity(first)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Extras]:
        return self.down(self.act(self.up(x))), NOTHING

    def flops(self, length: int) -> int:
        return 2 * (self.branches + 1) * self.d_model * self.d_hidden * length


class SwiGLU(Dense):
    branches, nonlinearity = 2, F.silu  # silu(gate) · value (Shazeer, arXiv 2002.05202)


class GeGLU(Dense):
    branches, nonlinearity = 2, F.gelu  # gelu(gate) · value, with the exact gelu (same paper)


class SquaredReLU(Dense):
    branches, nonlinearity = 1, lambda u: F.relu(u).square()  # relu(u)² (So et al., arXiv 2109.08668)


DENSE: dict[str, type[Dense]] = {"swiglu": SwiGLU, "geglu": GeGLU, "relu2": SquaredReLU}
