"""Random arguments for the cases of every op, drawn in float64 and rounded to the dtype asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Draw:
    """Tensors of one device and dtype from one CPU generator, so that every device sees the same values."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator):
        self.device, self.dtype, self.generator = device, dtype, generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._place(torch.randn(*shape, dtype=torch.float64, generator=self.generator) * scale)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self._place(torch.rand(*shape, dtype=torch.float64, generator=self.generator) * (high - low) + low)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length 1 along the last axis."""
        x = torch.randn(*shape, dtype=torch.float64, generator=self.generator)
        return self._place(x / x.norm(dim=-1, keepdim=True))

    def log_decay(self, *shape: int, low: float = -1.0) -> Tensor:
        """Each head or channel forgets at its own rate, from about `low` down to a thousandth, jittered over time."""
        rate = (torch.rand(*shape[2:] or shape, dtype=torch.float64, generator=self.generator) * -7.0).exp()
        return self._place(low * rate * (torch.rand(*shape, dtype=torch.float64, generator=self.generator) + 0.5))

    def offsets(self, lengths: Sequence[int] | None) -> Tensor | None:
        ends = torch.tensor([0, *(lengths or ())], dtype=torch.int64).cumsum(0)
        return None if lengths is None else ends.to(self.device, torch.int32)

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)
