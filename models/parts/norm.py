"""Root-mean-square normalisation, computed in float32 or wider."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.models.parts.init import Module


class RMSNorm(Module):
    """y = x / rms(x) · weight over the last axis (Zhang & Sennrich 2019). The weight stays float32 or wider."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), (self.dim,), self.weight.to(wide), self.eps).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # the small number keeps the gradient of an all-zero vector finite
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
