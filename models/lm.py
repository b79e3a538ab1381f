"""A language model whose layers are named blocks laid out by a pattern."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.models.block import Block
from hybridlab.models.layout import check_names, expand, parts_by_place, sharing
from hybridlab.models.mixer import Device, Dtype, State, Stateful
from hybridlab.models.parts.init import count
from hybridlab.models.parts.ngram import Found, NgramHeads
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing


class Output(NamedTuple):
    """logits [batch, time, vocab]; losses to add to the task loss, summed over layers; stats keyed `layer3.load`."""

    logits: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Row(NamedTuple):
    """One place in the table of a model. FLOPs are the mean forward FLOPs per token over a context of `length`."""

    place: int
    block: str
    mixer: str
    ffn: str
    params: int
    flops: float
    state_bytes: int


class HybridLM(Stateful):
    """Embedding, layers, norm, head.

    pattern   block names, repeated to `n_layers`; or a string read through `letters`
    blocks    name -> constructor of a block, given d_model
    places    place -> options that differ there from its block, e.g. {5: {"mixer": {"window": 64}}}; counted from 0
    shared    name -> places that share one set of parameters (each keeps its own state)
    tied      the head uses the embedding's matrix
    ngram     heads that look up the last tokens in the document so far, read before the first layer and at the head

    Raises ValueError on names, letters, places or keys that are unknown or unused.
    """

    def __init__(
        self, *, vocab_size: int, d_model: int, pattern: str | Sequence[str],
        blocks: Mapping[str, Callable[[int], Block]], n_layers: int | None = None,
        letters: Mapping[str, str] | None = None, places: Mapping[int, Mapping[str, Any]] | None = None,
        shared: Mapping[str, Sequence[int]] | None = None, tied: bool = False,
        ngram: Callable[[int], NgramHeads] | None = None,
    ):  # fmt: skip
        super().__init__()
        if vocab_size < 1 or d_model < 1:
            raise ValueError(f"vocab_size={vocab_size} and d_model={d_model} must be positive")
        self.vocab_size, self.d_model = vocab_size, d_model
        self.layout = expand(pattern, letters, n_layers)
        check_names(self.layout, blocks)
        self.owner = sharing(shared, self.layout)
        parts = parts_by_place(self.layout, blocks, places)
        if moved := [place for place in places or {} if self.owner[place] != place or self.owner.count(place) > 1]:
            raise ValueError(f"places overrides {moved}, which share their parameters; define a block instead")
        self.embed = nn.Embedding(vocab_size, d_model)
        self.ngram = ngram(d_model) if ngram else None
        self.layers = nn.ModuleDict({str(i): parts[i](d_model) for i in sorted(set(self.owner))})
        self.norm = RMSNorm(d_model)
        self.head = None if tied else nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embedded tokens of unit variance; first logits near zero; what writes into the residual, less with depth."""
        super().reset_parameters()
        (self.embed if self.head is None else self.head).weight.mul_(self.d_model**-0.5)
        for weight in (weight for i in set(self.owner) for weight in self._layer(i).output_weights()):
            weight.mul_((2 * len(self.layout)) ** -0.5)

    def _layer(self, owner: int) -> Block:
        return cast(Block, self.layers[str(owner)])

    def by_place(self) -> list[Block]:
        """The layer at every place; shared ones appear more than once."""
        return [self._layer(i) for i in self.owner]

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> Output:
        """tokens int64 [batch, time]. Raises ValueError when `packing` does not cover them."""
        if packing is not None:
            packing.check(*tokens.shape)
        found = None if self.ngram is None else self.ngram.find(tokens, packing)
        x = self._enter(tokens, found)
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        for place, layer in enumerate(self.by_place()):
            x, extras = layer(x, packing, tokens)
            for name, loss in extras.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
            stats |= {f"layer{place}.{name}": value for name, value in extras.stats.items()}
        return Output(self._logits(x, found), losses, stats)

    def _enter(self, tokens: Tensor, found: Found | None) -> Tensor:
        x = self.embed(tokens)
        if self.head is None:
            x = x * self.d_model**0.5  # small enough for the head, scaled for the layers
        return x if self.ngram is None or found is None else self.ngram.enter(x, found, self.embed)

    def _logits(self, x: Tensor, found: Found | None) -> Tensor:
        x = self.norm(x)
        logits = F.linear(x, self.embed.weight if self.head is None else self.head.weight)
        return logits if self.ngram is None or found is None else self.ngram.leave(logits, x, found)

    def init_state(self, batch: int, max_len: int, device: Device = None, dtype: Dtype = None) -> State:
        """One state per place (then the n-gram heads'), before the first token; defaults are the embedding's."""
        device, dtype = device or self.embed.weight.device, dtype or self.embed.weight.dtype
        states = [layer.init_state(batch, max_len, device, dtype) for layer in self.by_place()]
        return (*states, *([] if self.ngram is None else [self.ngram.init_state(batch, max_len, device)]))

    def prefill(self, tokens: Tensor, state: State, packing: Packing | None = None) -> tuple[Tensor, State]:
        """tokens int64 [batch, time] -> logits [batch, time, vocab], state. Consumes `state`.

        With `packing`, tokens is [1, tokens] and document i continues row i of the state.
        """
        found, *read = (None,) if self.ngram is None else self.ngram.prefill(tokens, state[-1], packing)
        return self._advance(lambda layer, x, s: layer.prefill(x, s, packing, tokens), tokens, state, found, read)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """tokens int64 [batch] -> logits [batch, vocab], state. Consumes `state`."""
        found, *read = (None,) if self.ngram is None else self.ngram.step(tokens, state[-1])
        return self._advance(lambda layer, x, s: layer.step(x, s, tokens), tokens, state, found, read)

    def _advance(self, advance: Callable, tokens: Tensor, state: State, found: Found | None, read: list) -> tuple:
        """`advance(layer, x, state)` -> x, state through all places; `read` is what the n-gram heads remember."""
        x, after = self._enter(tokens, found), []
        for layer, s in zip(self.by_place(), state, strict=False):
            x, s = advance(layer, x, s)
            after.append(s)
        return self._logits(x, found), (*after, *read)

    def flops(self, length: int) -> int:
        """Forward FLOPs on one document of `length` tokens, 2 per multiply-add."""
        around = 2 * self.vocab_size * self.d_model * length + (self.ngram.flops(length) if self.ngram else 0)
        return sum(layer.flops(length) for layer in self.by_place()) + around

    def n_params(self) -> tuple[int, int]:
        """Parameters in all, and those that one token passes through."""
        ffns = [layer.ffn for layer in map(self._layer, set(self.owner)) if layer.ffn is not None]
        return count(self), count(self) - sum(count(ffn) - ffn.active_params() for ffn in ffns)

    def table(self, length: int = 1024) -> list[Row]:
        """One row per place, for a context of `length` tokens. Shared parameters count where they stand first."""
        rows = []
        for place, (name, layer) in enumerate(zip(self.layout, self.by_place(), strict=True)):
            params = count(layer) if self.owner[place] == place else 0
            mixer, ffn = (type(part).__name__ if part is not None else "-" for part in (layer.mixer, layer.ffn))
            rows.append(Row(place, name, mixer, ffn, params, layer.flops(length) / length, layer.state_bytes(length)))
        return rows
