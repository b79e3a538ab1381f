"""Data sets of the Hugging Face hub, prepared once or streamed."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hybridlab.data.batch import Batch, Corpus, Rows, Split, make_batch
from hybridlab.data.order import UNBOUNDED
from hybridlab.data.shards import digest
from hybridlab.data.text import COLUMN, Text, check_ratio, held_out, only, texts_of, upto
from hybridlab.tokenizer import Tokenizer

_log = logging.getLogger("hybridlab.data")
_AT_ONCE = 64  # documents of a stream that are tokenized together


@dataclass(kw_only=True)
class Hub(Text):
    """A data set by name, or a local folder that `datasets.load_dataset` can read.

    valid_ratio     share of documents held out by their hash
    streaming       read as training goes: nothing is prepared, rows come in the stream's order, and a resumed run reads
                    the rows before its own again, which is exact only if the stream gives them as it did
    """

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    column: str = "text"
    valid_ratio: float = 0.01
    streaming: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.valid_ratio)

    def identity(self) -> dict[str, Any]:
        options = {"valid_ratio": self.valid_ratio, "streaming": self.streaming, "column": self.column}
        return {"name": self.name, "config": self.config, "revision": self.revision, "split": self.split, **options}

    def describe(self) -> dict[str, Any]:
        return {"data set": self.name, "split": self.split, "revision": self.revision or "the newest when prepared"}

    def load(self, cache: Path) -> Any:
        from datasets import load_dataset

        options = {"split": self.split, "revision": self.revision, "streaming": self.streaming}
        return only(load_dataset(self.name, self.config, cache_dir=str(cache), **options), self.column, self.name)

    def documents(self, cache: Path) -> dict[Split, Any]:
        found, ratio = self.load(cache.parent.parent / "hub"), self.valid_ratio
        train = found.filter(lambda text: not held_out(text, ratio), input_columns=COLUMN)
        return {"train": train, "valid": found.filter(lambda text: held_out(text, ratio), input_columns=COLUMN)}

    def prepare(self, folder: Path) -> Corpus:
        return StreamCorpus(self, folder / "hub") if self.streaming else super().prepare(folder)


class StreamCorpus(Corpus):
    """Training rows in the order of a stream, which begins again at its end; they must be asked for in that order.

    The first documents of the held-out share, as many as it takes for `VALID_BYTES`, are the validation split.
    """

    VALID_BYTES = 200_000
    tokenizer: Tokenizer

    def __init__(self, source: Hub, cache: Path) -> None:
        self._source, self._found, self._next = source, source.load(cache), 0
        held = upto(self._documents(valid=True), self.VALID_BYTES)
        if not held or next(self._documents(), None) is None:
            raise ValueError(f"no documents in the {'train' if held else 'valid'} split: {source.identity()}")
        self.tokenizer = source.make_tokenizer(self._documents())
        self.vocab_size, self.token_bytes = self.tokenizer.vocab_size, self.tokenizer.token_bytes
        self.fingerprint = digest([source.identity(), self.tokenizer.fingerprint])
        self.facts = {**source.describe(), "order": "as streamed; a resume is exact only if the stream repeats itself"}
        self._valid = Rows([self._tokens(held)], source.times["valid"], self.tokenizer.bos, whole=True)
        self._stream = self._cut(source.seq_len)

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
        if index > self._next == 0:
            _log.warning("reading past %d rows of the stream; exact only if it repeats itself", index)
        skip, self._next = index - self._next, index + 1
        return next(islice(self._stream, skip, None))

    def _cut(self, time: int) -> Iterator[np.ndarray]:
        """Rows int64 [time + 1] without end, each beginning with the last token of the one before."""
        documents = chain.from_iterable(self._documents() for _ in count())
        left = np.empty(0, np.int64)
        while True:
            left = np.concatenate([left, self._tokens(list(islice(documents, _AT_ONCE)))])
            n_rows = (len(left) - 1) // time
            yield from (left[i * time : (i + 1) * time + 1] for i in range(n_rows))
            left = left[n_rows * time :]

    def _documents(self, valid: bool = False) -> Iterator[bytes]:
        return (text for text in texts_of(self._found) if held_out(text, self._source.valid_ratio) == valid)

    def _tokens(self, texts: Sequence[bytes]) -> np.ndarray:
        return np.concatenate([np.append(self.tokenizer.bos, ids) for ids in self.tokenizer.encode_batch(texts)])
