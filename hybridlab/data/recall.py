"""Multi-query associative recall: pairs of key and value, then keys to answer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hybridlab.data.batch import UNSCORED, Batch, Corpus, Source, Split
from hybridlab.data.order import mix
from hybridlab.data.shards import digest
from hybridlab.packing import Packing

BLANK = 0


@dataclass(kw_only=True)
class Recall(Source, Corpus):
    """Each row is one document: n_pairs keys, all different, each followed by its value; then, among blanks, n_queries
    of these keys. Scored is only the token after a queried key, which should be the key's value.

    Ids: 0 is blank, the lower half of the rest are keys, the upper half values. Rows are drawn from (seed, split, row).
    """

    n_pairs: int = 8
    n_queries: int = 8
    train_rows: int = 100_000
    valid_rows: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_keys < self.n_pairs:
            raise ValueError(f"vocab_size={self.vocab_size} has {self.n_keys} keys, fewer than n_pairs={self.n_pairs}")
        needed, shortest = 2 * self.n_pairs + self.n_queries, min(self.times.values())
        if shortest < needed:
            raise ValueError(f"rows of {shortest} tokens cannot hold {self.n_pairs} pairs and {self.n_queries} queries")
        self.fingerprint = digest({"recall": asdict(self)})
        self.facts = {name: getattr(self, name) for name in ("n_pairs", "n_queries", "train_rows", "valid_rows")}

    @property
    def n_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def prepare(self, folder: Path) -> Corpus:
        return self

    def n_rows(self, split: Split) -> int:
        return self.train_rows if split == "train" else self.valid_rows

    def rows(self, split: Split, indices: Tensor | Sequence[int]) -> Batch:
        index, time, pairs = self._check(split, indices), self.times[split], 2 * self.n_pairs
        row = mix(self.seed, ("train", "valid").index(split), index)[:, None]
        keys = 1 + np.argsort(mix(row, 0, np.arange(self.n_keys)), axis=1)[:, : self.n_pairs]
        n_values = self.vocab_size - 1 - self.n_keys
        values = (1 + self.n_keys + mix(row, 1, np.arange(self.n_pairs)) % np.uint64(n_values)).astype(np.int64)
        asked = (mix(row, 2, np.arange(self.n_queries)) % np.uint64(self.n_pairs)).astype(np.int64)
        where = pairs + np.argsort(mix(row, 3, np.arange(time - pairs)), axis=1)[:, : self.n_queries]
        tokens = np.full((len(index), time), BLANK, np.int64)
        targets = np.full_like(tokens, UNSCORED)
        tokens[:, 0:pairs:2], tokens[:, 1:pairs:2] = keys, values
        np.put_along_axis(tokens, where, np.take_along_axis(keys, asked, 1), 1)
        np.put_along_axis(targets, where, np.take_along_axis(values, asked, 1), 1)
        packing = Packing.from_lengths([time] * len(index))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), packing, torch.from_numpy(index.copy()))
