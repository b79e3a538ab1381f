"""Tokens on disk: written once, checked whenever they are opened."""

import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybridlab.data.batch import Batch, Corpus, Rows, Split
from hybridlab.tokenizer import Tokenizer

SHARD_BYTES = 2**23  # of text in a shard, which is tokenized at once
INDEX, TOKENIZER = "index.json", "tokenizer.json"


def digest(value: Any) -> str:
    """SHA-256 of a value made of plain parts."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_once(folder: Path, name: str, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder that `write` filled, now or earlier; `key` says what it was filled from.

    It appears under its name only when complete. Of several processes one writes and the others wait; what a killed
    one left is removed.
    """
    home = folder / f"{name}-{key[:16]}"
    if home.exists():
        return home
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{home.name}.tmp-*"):
            shutil.rmtree(left)
        if not home.exists():
            temp = folder / f"{home.name}.tmp-{uuid.uuid4().hex}"
            temp.mkdir()
            try:
                index = {"key": key, **write(temp)}
                (temp / INDEX).write_text(json.dumps({**index, "digest": digest(index)}, indent=1))
                temp.rename(home)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
    return home


def write_split(folder: Path, split: Split, documents: Iterable[bytes], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the shards of one split, each document opened by `bos`; returns their record for the index."""
    record: dict[str, Any] = {"documents": 0, "bytes": 0, "tokens": 0, "shards": []}
    for texts in _batches(documents):
        parts = [np.append(tokenizer.bos, ids) for ids in tokenizer.encode_batch(texts)]
        tokens = np.concatenate(parts).astype(_dtype(tokenizer))
        name = f"{split}-{len(record['shards']):05d}.bin"
        tokens.tofile(folder / name)
        record["shards"].append(
            {"name": name, "bytes": tokens.nbytes, "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        )
        record["documents"] += len(texts)
        record["bytes"] += int(tokenizer.token_bytes.numpy()[tokens].sum())
        record["tokens"] += len(tokens)
    return record


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= SHARD_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ShardCorpus(Corpus):
    """Prepared text. Raises ValueError, naming the file, when anything in it is not what was written."""

    tokenizer: Tokenizer

    def __init__(self, home: Path, key: str, times: dict[Split, int]) -> None:
        index = _read_index(home / INDEX, key)
        _require(home / TOKENIZER, index["tokenizer"])
        self.tokenizer = Tokenizer.load(home / TOKENIZER)
        self.vocab_size, self.token_bytes = self.tokenizer.vocab_size, self.tokenizer.token_bytes
        self.fingerprint, self.facts = key, index["facts"]
        self._rows = {}
        for split, time in times.items():
            pieces = [self._open(home / shard["name"], shard) for shard in index["splits"][split]["shards"]]
            self._rows[split] = rows = Rows(pieces, time, self.tokenizer.bos, whole=split == "valid")
            if not rows.n_rows:
                raise ValueError(f"{split} holds {rows.n_tokens} tokens, too few for one row of {time}")

    def n_rows(self, split: Split) -> int:
        return self._rows[split].n_rows

    def rows(self, split: Split, indices: Any) -> Batch:
        return self._rows[split].batch(self._check(split, indices))

    def _open(self, path: Path, record: dict[str, Any]) -> np.ndarray:
        _require(path, record)
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


def _require(path: Path, record: dict[str, Any]) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size != record["bytes"]:
        raise _damaged(path, f"it holds {size} bytes, not {record['bytes']}")
    if file_hash(path) != record["sha256"]:
        raise _damaged(path, "its contents do not match its SHA-256")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"prepared data {path}: {what}; delete the folder {path.parent} to prepare it again")
