"""Tokens on disk: written once, checked whenever they are opened."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybridlab.data.batch import Batch, Corpus, Rows, Split
from hybridlab.tokenizer import DataError, Tokenizer

SHARD_BYTES = 2**23  # of text in a shard, which is tokenized at once
INDEX, TOKENIZER = "index.json", "tokenizer.json"


def digest(value: Any) -> str:
    """SHA-256 of a value made of plain parts."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def batches(texts: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """The texts in turn, in lists of `size` bytes or just above."""
    batch: list[bytes] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def tokenized(texts: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """int64 [tokens]: documents end to end, each opened by `bos`."""
    return np.concatenate([np.append(tokenizer.bos, ids) for ids in tokenizer.encode_batch(texts)])


def prepare_once(folder: Path, name: str, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder that `write` filled, now or earlier; `key` says what it was filled from.

    It appears under its name only when complete, with an index of its files and of the facts that `write` returns. Of
    several processes one writes and the others wait; what a killed one left is removed.
    """
    home, temp = (folder / f"{name}-{key[:16]}{end}" for end in ("", ".tmp"))
    if home.exists():
        return home
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(temp, ignore_errors=True)
        if not home.exists():
            temp.mkdir()
            try:
                index = {"key": key, "facts": write(temp), "sha256": {p.name: file_hash(p) for p in temp.iterdir()}}
                (temp / INDEX).write_text(json.dumps({**index, "digest": digest(index)}, indent=1))
                temp.rename(home)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
    return home


def write_split(folder: Path, split: str, documents: Iterable[bytes], tokenizer: Tokenizer) -> dict[str, int]:
    """Write the shards of one split; returns how many documents, bytes and tokens they hold."""
    counts = dict.fromkeys(("documents", "bytes", "tokens"), 0)
    for i, texts in enumerate(batches(documents, SHARD_BYTES)):
        tokens = tokenized(texts, tokenizer)
        tokens.astype(_dtype(tokenizer)).tofile(folder / f"{split}-{i:05d}.bin")
        counts["documents"] += len(texts)
        counts["bytes"] += int(tokenizer.token_bytes.numpy()[tokens].sum())
        counts["tokens"] += len(tokens)
    return counts


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


class ShardCorpus(Corpus):
    """Prepared text. Raises DataError, naming the file, when anything in it is not what was written."""

    tokenizer: Tokenizer

    def __init__(self, home: Path, key: str, times: dict[Split, int]) -> None:
        index = _read_index(home / INDEX, key)
        for name, sha in index["sha256"].items():
            if not (home / name).exists() or file_hash(home / name) != sha:
                raise _damaged(home / name, "it is missing, or its contents do not match its SHA-256")
        self.tokenizer = Tokenizer.load(home / TOKENIZER)
        self.vocab_size, self.token_bytes = self.tokenizer.vocab_size, self.tokenizer.token_bytes
        self.fingerprint, self.facts = key, index["facts"]
        self._rows = {}
        for split, time in times.items():
            pieces = [self._open(home / name) for name in sorted(index["sha256"]) if name.startswith(split)]
            self._rows[split] = Rows(pieces, time, self.tokenizer.bos, whole=split == "valid")

    def n_rows(self, split: Split) -> int:
        return self._rows[split].n_rows

    def rows(self, split: Split, indices: Any) -> Batch:
        return self._rows[split].batch(self._check(split, indices))

    def _open(self, path: Path) -> np.ndarray:
        tokens = np.memmap(path, _dtype(self.tokenizer), mode="r")
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise _damaged(path, f"it holds token {largest}, but the vocabulary has {self.vocab_size}")
        return tokens


def _read_index(path: Path, key: str) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        if index.pop("digest") != digest(index):
            raise ValueError("its contents do not match its SHA-256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, str(error)) from error
    if index["key"] != key:
        raise _damaged(path, f"it was made from {index['key'][:16]}, not from {key[:16]}")
    return index


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"prepared data {path}: {what}; delete the folder {path.parent} to prepare it again")
