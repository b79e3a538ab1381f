"""The one interface every token mixer implements."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hybridlab.models.parts.init import Module
from hybridlab.packing import Packing

State = Any  # a NamedTuple of tensors (or of States), one type per mixer; the first axis of every tensor is the batch
Device = torch.device | str | None
Dtype = torch.dtype | None


class Stateful(Module, ABC):
    """What can go on token by token, because all that it must remember stands in a state."""

    @abstractmethod
    def init_state(self, batch: int, max_len: int, device: Device = None, dtype: Dtype = None) -> State:
        """State before the first token. `max_len` bounds what it must remember; recurrences are float32 or wider."""

    def state_bytes(self, max_len: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of state held per sequence, read off `init_state` without allocating it."""
        return sum(t.nbytes for t in state_tensors(self.init_state(1, max_len, "meta", dtype)))


class TokenMixer(Stateful):
    """Mixes information along time; never along batch, never backwards in time.

    x is [batch, time, d_model]. Parameters a mixer owns itself (decays, step sizes, skips) stay float32 or wider under
    `.to(bfloat16)` and are trained without weight decay; matrices belong in `nn.Linear` children, and the last of them,
    which writes into the residual stream, is called `out`.
    """

    d_model: int
    out: nn.Linear

    @abstractmethod
    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """x [batch, time, d_model] -> same shape. With `packing`, documents do not see each other."""

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [batch, d_model] -> y [batch, d_model]. Consumes `state`: only the returned one may be used again."""

    def prefill(self, x: Tensor, state: State, packing: Packing | None = None) -> tuple[Tensor, State]:
        """Advance `state` by any number of tokens, x [batch, time, d_model]. Consumes `state`.

        With `packing`, x is [1, tokens, d_model] and document i continues row i of the state. This default is right for
        every mixer and slow; override it with the chunked form.
        """
        if packing is not None:
            return self._prefill_documents(x, state, packing)
        ys = []
        for x_t in x.unbind(1):
            y_t, state = self.step(x_t, state)
            ys.append(y_t)
        return (torch.stack(ys, 1) if ys else torch.empty_like(x)), state

    def _prefill_documents(self, x: Tensor, state: State, packing: Packing) -> tuple[Tensor, State]:
        packing.check(x.shape[0], x.shape[1], docs=len(state_tensors(state)[0]))
        docs = enumerate(x.split(packing.offsets.diff().tolist(), dim=1))
        parts = [self.prefill(doc, map_state(lambda t, i=i: t[i : i + 1], state)) for i, doc in docs]
        return torch.cat([y for y, _ in parts], 1), map_state(lambda *rows: torch.cat(rows), *(row for _, row in parts))

    def output_weights(self) -> list[Tensor]:
        """The matrices that write into the residual stream; models scale their initial values by depth."""
        return [self.out.weight]

    @abstractmethod
    def flops(self, length: int) -> int:
        """Forward FLOPs of the mathematics on one document; `flops(n) - flops(n - 1)` is the n-th step."""


def wide(dtype: Dtype) -> torch.dtype:
    """The dtype that states and accumulations use for inputs of `dtype`: float32 or wider."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def state_tensors(state: State) -> list[Tensor]:
    """Every tensor of a state, in a fixed order."""
    return tree_leaves(state)


def map_state(fn: Callable[..., Tensor], *states: State) -> State:
    """Apply `fn` to corresponding tensors of states of one type."""
    return tree_map(fn, *states)
