"""Text: the running Python's own standard library, and local files."""

import gzip
import hashlib
import lzma
import os
import platform
import sysconfig
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from hybridlab.data.batch import Corpus, Source, Split
from hybridlab.data.order import order
from hybridlab.data.shards import TOKENIZER, ShardCorpus, batches, digest, file_hash, prepare_once, write_split
from hybridlab.tokenizer import DataError, Tokenizer, as_bytes

FORMAT = 2  # of the prepared folders; raise it when they change
WHOLE, ROWS = (".txt", ".md", ".py"), {".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED_BYTES = 2**26  # beyond this xz takes a minute


@dataclass(kw_only=True)
class Text(Source):
    """Documents as tokens. `tokenizer` is bpe, trained on the training split; bytes; or the path of a tokenizer file.

    tokenizer_bytes   how much text a BPE is trained on
    """

    tokenizer: str = "bpe"
    tokenizer_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer != "bpe":
            self.make_tokenizer()
        elif self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}: bpe needs 257 or more, 256 bytes and a document start")

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the documents depend on, in words for the reader."""

    @abstractmethod
    def read(self, folder: Path) -> Iterator[tuple[Split, bytes]]:
        """Every document with its split; `folder` keeps what is downloaded."""

    def prepare(self, folder: Path) -> Corpus:
        kind, bpe = type(self).__name__, self.tokenizer == "bpe"
        tokens = [self.vocab_size, self.tokenizer_bytes] if bpe else self.make_tokenizer().fingerprint
        key = digest([FORMAT, kind, self.identity(), tokens])
        return ShardCorpus(prepare_once(folder, kind.lower(), key, self._write), key, self.times)

    def make_tokenizer(self, texts: Iterable[bytes] = ()) -> Tokenizer:
        """The one given, or a BPE of the first of the texts."""
        if self.tokenizer == "bpe":
            return Tokenizer.train(next(batches(texts, self.tokenizer_bytes)), self.vocab_size)
        tokenizer = Tokenizer.from_bytes() if self.tokenizer == "bytes" else Tokenizer.load(self.tokenizer)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(f"vocab_size={self.vocab_size}, but tokenizer={self.tokenizer} has {tokenizer.vocab_size}")
        return tokenizer

    def _write(self, temp: Path) -> dict[str, Any]:
        """Fill a folder with tokenizer and shards; returns the facts."""
        from datasets import Dataset, Features, Value
        from datasets.arrow_writer import ArrowWriter
        from tqdm import tqdm

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that worker processes need no warning
        # on disk first, so that documents can be counted and drawn from anywhere
        path, columns = temp / "documents", Features({"split": Value("string"), "text": Value("large_binary")})
        with ArrowWriter(path=str(path), features=columns) as writer:
            for split, text in tqdm(self.read(temp.parent), "reading", unit=" documents"):
                writer.write({"split": split, "text": text})
            writer.finalize()
        found = Dataset.from_file(str(path))
        path.unlink()
        splits, facts = np.array(found["split"][:]), self.identity()
        train, valid = (found.select(np.flatnonzero(splits == split)) for split in ("train", "valid"))
        if not (len(train) and len(valid)):
            raise DataError(f"no documents in the {'valid' if len(train) else 'train'} split of {self}")
        anywhere = order(0, len(train), range(len(train))).tolist()
        tokenizer = self.make_tokenizer(train.select(anywhere)["text"])
        tokenizer.save(temp / TOKENIZER)
        for split, part in (("train", train), ("valid", valid)):
            texts = tqdm(part["text"], f"tokenizing {split}", unit=" documents")
            counts = write_split(temp, split, texts, tokenizer)
            facts |= {f"{split} {name}": count for name, count in counts.items()}
        if facts["valid bytes"] <= _COMPRESSED_BYTES:
            facts |= compressed(b"".join(valid["text"]))
        return facts


@dataclass(kw_only=True)
class PythonStdlib(Text):
    """The *.py files of the running interpreter's standard library, one twentieth of them held out by path.

    folder   a part of the library, such as "json"; paths count from the library's root all the same
    """

    folder: str = "."

    def identity(self) -> dict[str, Any]:
        corpus = digest({name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()})
        python = f"{platform.python_implementation()} {platform.python_version()}"
        size = sum(map(len, self._files.values()))
        return {"python": python, "files": len(self._files), "bytes": size, "corpus": corpus[:16]}

    def read(self, folder: Path) -> Iterator[tuple[Split, bytes]]:
        for name, data in self._files.items():
            yield ("train" if _hash(name.encode()) % 20 else "valid"), data

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """POSIX relative path -> content, in path order; unreadable files are left out."""
        root, found = Path(sysconfig.get_path("stdlib")), {}
        for path in (root / self.folder).rglob("*.py"):
            name = path.relative_to(root)
            if not {"site-packages", "__pycache__"} & set(name.parts) and os.access(path, os.R_OK) and path.is_file():
                found[name.as_posix()] = path.read_bytes()
        if not found:
            raise DataError(f"folder={self.folder!r}: no *.py files under {root / self.folder}")
        return dict(sorted(found.items()))


@dataclass(kw_only=True)
class HashedText(Text):
    """Documents that are held out by their own hash, so that equal ones stay together.

    valid_ratio   share of documents held out
    column        where rows keep their text
    """

    valid_ratio: float = 0.05
    column: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.valid_ratio < 1:
            raise ValueError(f"valid_ratio={self.valid_ratio} must lie between 0 and 1")

    @abstractmethod
    def texts(self, folder: Path) -> Iterator[bytes]:
        """Every document."""

    def read(self, folder: Path) -> Iterator[tuple[Split, bytes]]:
        for text in self.texts(folder):
            yield ("valid" if _hash(text) < self.valid_ratio * 2**64 else "train"), text

    def rows(self, found: Iterable[dict[str, Any]], name: str | Path) -> Iterator[bytes]:
        """Documents of a data set, one per row."""
        for i, row in enumerate(found):
            if not isinstance(text := row.get(self.column), str | bytes):
                raise DataError(f"column={self.column!r}: row {i} of {name} has {text!r:.60} there, and {list(row)}")
            yield as_bytes(text)


@dataclass(kw_only=True)
class TextFiles(HashedText):
    """Local .txt, .md and .py files, a document each, and .jsonl and .parquet files, a document per row.

    paths   files, folders and globs
    """

    paths: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._files  # patterns that match nothing are refused here

    def identity(self) -> dict[str, Any]:
        corpus = digest([f"{path.suffix} {file_hash(path)}" for path in self._files])[:16]
        return {"files": len(self._files), "corpus": corpus, "held out": str(self.valid_ratio), "column": self.column}

    def texts(self, folder: Path) -> Iterator[bytes]:
        from datasets import load_dataset

        for path in self._files:
            if path.suffix in WHOLE:
                yield path.read_bytes()
            else:
                found = load_dataset(ROWS[path.suffix], data_files=[str(path)], split="train", streaming=True)
                yield from self.rows(found, path)

    @cached_property
    def _files(self) -> list[Path]:
        """Every file that the patterns name, once, in path order."""
        found: set[Path] = set()
        for pattern in self.paths:
            hits = [Path(hit) for hit in glob(pattern, recursive=True) or [pattern]]  # noqa: PTH207  Path.glob refuses "/"
            files = [p.resolve() for hit in hits for p in (hit.rglob("*") if hit.is_dir() else [hit]) if p.is_file()]
            if not (fitting := {p for p in files if p.suffix in (*WHOLE, *ROWS)}):
                raise ValueError(f"paths: {pattern!r} matches no file ending in {', '.join((*WHOLE, *ROWS))}")
            found |= fitting
        return sorted(found)


def compressed(data: bytes) -> dict[str, float]:
    """Bits per byte that general compressors need, as `gzip -9` and `xz -9e` do on a file."""
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / max(1, len(data)) for name, size in sizes.items()}


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
