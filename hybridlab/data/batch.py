"""What data gives to training: batches of rows, from a corpus that a source has prepared."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridlab.packing import Packing
from hybridlab.tokenizer import DataError, Tokenizer

Split = Literal["train", "valid"]
UNSCORED = -100


class Batch(NamedTuple):
    tokens: Tensor  # int64 [batch, time]
    targets: Tensor  # int64 [batch, time]: what should follow each token; -100 where nothing is scored
    packing: Packing  # documents; every row start begins one
    rows: Tensor  # int64 [batch]: which rows these are


class Corpus(ABC):
    """Rows that can be fetched in any order.

    facts         what a reader should know of the data, by name
    token_bytes   int64 [vocab] or None: bytes each id stands for, where tokens stand for bytes
    """

    vocab_size: int
    fingerprint: str
    facts: dict[str, Any]
    tokenizer: Tokenizer | None = None
    token_bytes: Tensor | None = None

    @abstractmethod
    def n_rows(self, split: Split) -> int: ...

    @abstractmethod
    def rows(self, split: Split, indices: Tensor | Sequence[int]) -> Batch: ...

    def _check(self, split: Split, indices: Tensor | Sequence[int]) -> np.ndarray:
        index, n_rows = np.array(indices, dtype=np.int64), self.n_rows(split)
        if not index.size or index.min() < 0 or index.max() >= n_rows:
            raise IndexError(f"rows {index.tolist()} of {split}: give at least one, from 0 to {n_rows - 1}")
        return index


@dataclass(kw_only=True)
class Source(ABC):
    """Where data comes from. batch_size is in rows per optimizer step, over all ranks."""

    vocab_size: int
    seq_len: int
    batch_size: int
    valid_seq_len: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1 and name != "seed":
                raise ValueError(f"{name}={value} must be at least 1")

    @property
    def times(self) -> dict[Split, int]:
        """Tokens in a row of each split."""
        return {"train": self.seq_len, "valid": self.valid_seq_len or self.seq_len}

    @abstractmethod
    def prepare(self, folder: Path) -> Corpus:
        """The corpus, kept in `folder` where preparing it takes work. Raises DataError."""


class Rows:
    """Rows of `time` tokens cut from documents laid end to end, in one or more pieces, each document opened by `bos`.
    Raises DataError where there are too few tokens for one.

    The last target of a row is the first token of the next, so that every token but the very first is predicted once.
    whole   keep the last, short row, padded by unscored documents of one `bos`; else leave it out
    """

    def __init__(self, pieces: Sequence[np.ndarray], time: int, bos: int, whole: bool) -> None:
        self.pieces, self.time, self.bos = pieces, time, bos
        self.ends = np.cumsum([len(piece) for piece in pieces])
        self.n_tokens = int(self.ends[-1])
        self.n_rows = -(-(self.n_tokens - 1) // time) if whole else (self.n_tokens - 1) // time
        if self.n_rows < 1:
            raise DataError(f"{self.n_tokens} tokens are too few for one row of {time} and what follows it")

    def batch(self, index: np.ndarray) -> Batch:
        """index int64 [batch]"""
        at = index[:, None] * self.time + np.arange(self.time + 1)
        tokens = np.full(at.shape, self.bos, np.int64)
        piece = np.searchsorted(self.ends, at, side="right")
        for i in np.unique(piece[at < self.n_tokens]):
            here = piece == i
            tokens[here] = self.pieces[i][at[here] - (self.ends[i] - len(self.pieces[i]))]
        batch = make_batch(tokens, self.bos, index)
        batch.targets[torch.from_numpy(at[:, 1:] >= self.n_tokens)] = UNSCORED
        return batch


def make_batch(tokens: np.ndarray, bos: int, index: np.ndarray) -> Batch:
    """tokens int64 [batch, time + 1]; index int64 [batch]"""
    inputs, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
    return Batch(inputs, targets, Packing.from_starts(inputs == bos), torch.from_numpy(index))
