"""Data sets of the Hugging Face hub, prepared once or streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hybridlab.data.batch import Batch, Corpus, Rows, Split, make_batch
from hybridlab.data.order import UNBOUNDED
from hybridlab.data.shards import batches, digest, tokenized
from hybridlab.data.text import HashedText
from hybridlab.tokenizer import DataError, Tokenizer

_AT_ONCE = 2**18  # bytes of a stream that are tokenized together; its first held-out ones are the validation split


@dataclass(kw_only=True)
class Hub(HashedText):
    """A data set by name, or a local folder that `datasets.load_dataset` can read.

    streaming   read as training goes: nothing is prepared, rows come in the stream's order, and a resumed run reads
                the rows before its own again, which is exact only if the stream gives them as it did
    """

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    valid_ratio: float = 0.01
    streaming: bool = False

    def identity(self) -> dict[str, Any]:
        name = {"data set": self.name, "config": self.config, "split": self.split, "column": self.column}
        order = "as streamed; a resume is exact only if the stream repeats itself" if self.streaming else "shuffled"
        revision = self.revision or "the newest when prepared"
        return {**name, "revision": revision, "held out": str(self.valid_ratio), "order": order}

    def texts(self, folder: Path) -> Iterator[bytes]:
        from datasets import load_dataset

        options = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
        return self.rows(load_dataset(self.name, self.config, cache_dir=str(folder / "hub"), **options), self.name)

    def prepare(self, folder: Path) -> Corpus:
        return StreamCorpus(self, folder) if self.streaming else super().prepare(folder)


class StreamCorpus(Corpus):
    """Training rows in the order of a stream, which begins again at its end; they must be asked for in that order."""

    tokenizer: Tokenizer

    def __init__(self, source: Hub, folder: Path) -> None:
        self._source, self._folder, self._next = source, folder, UNBOUNDED
        held = next(batches(self._documents("valid"), _AT_ONCE), None)
        if held is None or next(self._documents("train"), None) is None:
            raise DataError(f"no documents in the {'train' if held else 'valid'} split of {source}")
        self.tokenizer = source.make_tokenizer(self._documents("train"))
        self.vocab_size, self.token_bytes = self.tokenizer.vocab_size, self.tokenizer.token_bytes
        self.facts = source.identity()
        self.fingerprint = digest([self.facts, self.tokenizer.fingerprint])
        self._valid = Rows([tokenized(held, self.tokenizer)], source.times["valid"], self.tokenizer.bos, whole=True)

    def n_rows(self, split: Split) -> int:
        return UNBOUNDED if split == "train" else self._valid.n_rows

    def rows(self, split: Split, indices: Tensor | Sequence[int]) -> Batch:
        index = self._check(split, indices)
        if split == "valid":
            return self._valid.batch(index)
        return make_batch(np.stack([self._row(i) for i in index.tolist()]), self.tokenizer.bos, index)

    def _row(self, index: int) -> np.ndarray:
        if index < self._next:
            self._stream, self._next = self._cut(self._source.seq_len), 0
        skip, self._next = index - self._next, index + 1
        return next(islice(self._stream, skip, None))

    def _cut(self, time: int) -> Iterator[np.ndarray]:
        """Rows int64 [time + 1] without end, each beginning with the last token of the one before."""
        left = np.empty(0, np.int64)
        for texts in chain.from_iterable(batches(self._documents("train"), _AT_ONCE) for _ in count()):
            left = np.concatenate([left, tokenized(texts, self.tokenizer)])
            n_rows = (len(left) - 1) // time
            yield from (left[i * time : (i + 1) * time + 1] for i in range(n_rows))
            left = left[n_rows * time :]

    def _documents(self, split: Split) -> Iterator[bytes]:
        return (text for found, text in self._source.read(self._folder) if found == split)
