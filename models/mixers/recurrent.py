"""What mixers with a state of fixed size share: one computation behind forward, prefill and step."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from hybridlab.models.mixer import Device, Dtype, State, TokenMixer, wide
from hybridlab.models.parts.conv import ShortConv
from hybridlab.packing import Packing

Zeros = Callable[..., Tensor]


class ConvState(NamedTuple):
    """A short convolution in front of a memory."""

    conv: Tensor  # [batch, width - 1, channels], float32 or wider
    memory: Tensor  # [batch, ...] as the mixer says, float32 or wider


class RecurrentMixer(TokenMixer):
    """A mixer written as `scan`: start from a state, take in tokens, return outputs and the state after them."""

    @abstractmethod
    def scan(self, x: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """x [batch, time, d_model] -> y of the same shape, and the state after the last token; None starts empty.

        With `packing`, x is [1, tokens, d_model] and document i starts from row i of the state.
        """

    @abstractmethod
    def empty(self, zeros: Zeros) -> State:
        """The state before the first token; `zeros(*shape)` is [batch, *shape], float32 or wider."""

    @abstractmethod
    def flops_beside(self) -> int:
        """FLOPs per token beside the matrices and convolutions."""

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        if packing is None:
            return self.scan(x, None, None)[0]
        packing.check(*x.shape[:2])
        y, _ = self.scan(rearrange(x, "b t d -> 1 (b t) d"), None, packing)
        return rearrange(y, "1 (b t) d -> b t d", b=len(x))

    def prefill(self, x: Tensor, state: State, packing: Packing | None = None) -> tuple[Tensor, State]:
        if packing is not None:
            packing.check(*x.shape[:2])
        return self.scan(x, state, packing) if x.numel() else (x, state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.scan(rearrange(x, "b d -> b 1 d"), state, None)
        return rearrange(y, "b 1 d -> b d"), state

    def init_state(self, batch: int, max_len: int, device: Device = None, dtype: Dtype = None) -> State:
        return self.empty(lambda *shape: torch.zeros(batch, *shape, device=device, dtype=wide(dtype)))

    def flops(self, length: int) -> int:
        weights = (part.weight for part in self.modules() if isinstance(part, nn.Linear | ShortConv))
        return length * (2 * sum(weight.numel() for weight in weights) + self.flops_beside())


def divide(total: int, parts: int, total_name: str, parts_name: str) -> int:
    """total / parts, or ValueError with both names and values."""
    if parts < 1 or total % parts:
        raise ValueError(f"{parts_name}={parts} does not divide {total_name}={total}")
    return total // parts


@torch.no_grad()
def fill_dt_bias(bias: Tensor, low: float = 1e-3, high: float = 0.1) -> None:
    """Fill so that softplus(bias) is log-uniform between `low` and `high` (Gu & Dao 2023, section 3.6)."""
    step = nn.init.uniform_(bias, math.log(low), math.log(high)).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))
