"""The one interface every feed-forward layer implements."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from hybridlab.models.parts.init import Module, count


class Extras(NamedTuple):
    """What a layer says beside its output.

    losses   scalars to add to the task loss, already weighted by their coefficients
    stats    tensors to log, detached; counts are sums, so that they add up over micro-batches and ranks
    """

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


NOTHING = Extras({}, {})


class FeedForward(Module, ABC):
    """Transforms each token by itself; its last projection, which writes into the residual stream, is called `down`."""

    d_model: int
    down: nn.Linear

    @abstractmethod
    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Extras]:
        """x [..., d_model], tokens int64 [...] (what hash routing reads) -> y [..., d_model] and extras."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Forward FLOPs on `length` tokens, 2 per multiply-add, of what is active per token."""

    def output_weights(self) -> list[Tensor]:
        """The matrices that write into the residual stream; models scale their initial values by depth."""
        return [self.down.weight]

    def active_params(self) -> int:
        """Parameters that one token passes through."""
        return count(self)
