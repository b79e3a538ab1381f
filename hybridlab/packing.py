"""Where documents begin and end in the tokens of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Documents laid end to end in the flattened view [batch · time] of a batch, in row order.

    offsets   int32 [docs + 1]   first token of each document, then the number of tokens; repeats mark empty documents
    longest   int                tokens in the longest document, kept on the host to avoid a sync
    """

    offsets: Tensor
    longest: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> "Packing":
        """Documents of the given lengths in tokens, zero allowed. Raises ValueError on none or on a negative length."""
        if not lengths or min(lengths) < 0:
            raise ValueError(f"lengths={list(lengths)}: give at least one document, none of negative length")
        return cls(torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32), max(lengths))

    @classmethod
    def from_starts(cls, starts: Tensor) -> "Packing":
        """starts bool [batch, time], true where a document begins. Every row start begins one, marked or not."""
        marked = starts.clone()
        marked[:, 0] = True
        first = marked.flatten().nonzero().flatten()
        offsets = torch.cat([first, first.new_tensor([marked.numel()])]).to(torch.int32)
        return cls(offsets, int(offsets.diff().max()))

    @cached_property
    def tokens(self) -> int:
        """Number of tokens covered; syncs once on a GPU."""
        return int(self.offsets[-1])

    @cached_property
    def ids(self) -> Tensor:
        """int64 [tokens]: the document of each token."""
        lengths = self.offsets.diff().long()
        docs = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(docs, lengths, output_size=self.tokens)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [tokens]: index of each token in its own document; 0 marks a document start."""
        return torch.arange(self.tokens, device=self.offsets.device) - self.offsets[:-1].long()[self.ids]

    def row_ids(self, time: int) -> Tensor:
        """int64 [batch, time]: the document of each token, by row."""
        return self.ids.view(-1, time)

    def row_positions(self, time: int) -> Tensor:
        """int64 [batch, time]: index of each token in its own document, by row."""
        return self.positions.view(-1, time)

    def check(self, batch: int, time: int, docs: int | None = None) -> None:
        """Raise ValueError unless the documents cover exactly batch · time tokens (and number `docs`, where given)."""
        if self.tokens != batch * time:
            raise ValueError(f"packing covers {self.tokens} tokens, but x holds {batch} x {time} = {batch * time}")
        if docs not in (None, len(self.offsets) - 1):
            raise ValueError(f"packing holds {len(self.offsets) - 1} documents, but the state has {docs} rows")

    def to(self, device: torch.device | str) -> "Packing":
        return Packing(self.offsets.to(device), self.longest)
