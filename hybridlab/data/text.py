"""Text: the running Python's own standard library, and local files."""

import gzip
import hashlib
import lzma
import os
import platform
import shutil
import sysconfig
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from hybridlab.data.batch import Corpus, Source, Split
from hybridlab.data.order import order
from hybridlab.data.shards import TOKENIZER, ShardCorpus, digest, file_hash, prepare_once, write_split
from hybridlab.tokenizer import Tokenizer, as_bytes

FORMAT = 1  # of the prepared folders; raise it when they change
COLUMN = "document"
WHOLE, ROWS = (".txt", ".md", ".py"), {".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED_BYTES = 2**26  # beyond this xz takes a minute


@dataclass(kw_only=True)
class Text(Source):
    """Documents as tokens. `tokenizer` is bpe, trained on the training split; bytes; or the path of a tokenizer file.

    tokenizer_bytes   how much text a BPE is trained on, at most
    """

    tokenizer: str = "bpe"
    tokenizer_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer_bytes < 1:
            raise ValueError(f"tokenizer_bytes={self.tokenizer_bytes} must be at least 1")
        if self.tokenizer != "bpe":
            self._given()
        elif self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}: bpe needs 257 or more, 256 bytes and a document start")

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the documents depend on."""

    @abstractmethod
    def documents(self, cache: Path) -> dict[Split, Any]:
        """Per split a `datasets.Dataset` with one column, COLUMN, of text or bytes."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Facts beside those that hold for any text."""

    def prepare(self, folder: Path) -> Corpus:
        kind, bpe = type(self).__name__, [self.vocab_size, self.tokenizer_bytes]
        key = digest([FORMAT, kind, self.identity(), bpe if self.tokenizer == "bpe" else self._given().fingerprint])
        return ShardCorpus(prepare_once(folder, kind.lower(), key, self._write), key, self.times)

    def make_tokenizer(self, texts: Iterable[bytes]) -> Tokenizer:
        """The one given, or a BPE of the first of the texts."""
        if self.tokenizer != "bpe":
            return self._given()
        return Tokenizer.train(upto(texts, self.tokenizer_bytes), self.vocab_size)

    def _given(self) -> Tokenizer:
        tokenizer = Tokenizer.from_bytes() if self.tokenizer == "bytes" else Tokenizer.load(self.tokenizer)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(f"vocab_size={self.vocab_size}, but tokenizer={self.tokenizer} has {tokenizer.vocab_size}")
        return tokenizer

    def _write(self, temp: Path) -> dict[str, Any]:
        """Fill a folder with tokenizer and shards; returns the index."""
        from tqdm import tqdm

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that worker processes need no warning
        splits, records = self.documents(temp / "documents"), {}
        if empty := [split for split, found in splits.items() if not len(found)]:
            raise ValueError(f"no documents in the {empty[0]} split of {self}")
        anywhere = order(0, len(splits["train"]), range(len(splits["train"]))).tolist()
        tokenizer = self.make_tokenizer(texts_of(splits["train"][i] for i in anywhere))
        tokenizer.save(temp / TOKENIZER)
        facts = self.describe()
        for split, found in splits.items():
            texts = tqdm(texts_of(found), f"tokenizing {split}", len(found), unit=" documents")
            records[split] = write_split(temp, split, texts, tokenizer)
            facts |= {f"{split} {name}": records[split][name] for name in ("documents", "bytes", "tokens")}
        if records["valid"]["bytes"] <= _COMPRESSED_BYTES:
            facts |= compressed(b"".join(texts_of(splits["valid"])))
        shutil.rmtree(temp / "documents", ignore_errors=True)
        saved = {"bytes": (temp / TOKENIZER).stat().st_size, "sha256": file_hash(temp / TOKENIZER)}
        return {"tokenizer": saved, "splits": records, "facts": facts}


@dataclass(kw_only=True)
class PythonStdlib(Text):
    """The *.py files of the running interpreter's standard library, one twentieth of them held out by path.

    folder   a part of the library, such as "json"; paths count from the library's root all the same
    """

    folder: str = "."

    def identity(self) -> dict[str, Any]:
        """Hash of every path and content."""
        return {"corpus": digest({name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()})}

    def describe(self) -> dict[str, Any]:
        python = f"{platform.python_implementation()} {platform.python_version()}"
        size = sum(map(len, self._files.values()))
        return {"python": python, "files": len(self._files), "bytes": size, "corpus": self.identity()["corpus"][:16]}

    def documents(self, cache: Path) -> dict[Split, Any]:
        def read(valid: bool) -> Iterator[bytes]:
            return (data for name, data in self._files.items() if (_hash(name.encode()) % 20 == 0) == valid)

        return _generated(read, cache)

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """POSIX relative path -> content, in path order; unreadable files are left out."""
        root, found = Path(sysconfig.get_path("stdlib")), {}
        for path in (root / self.folder).rglob("*.py"):
            name = path.relative_to(root)
            if not {"site-packages", "__pycache__"} & set(name.parts) and os.access(path, os.R_OK) and path.is_file():
                found[name.as_posix()] = path.read_bytes()
        if not found:
            raise ValueError(f"folder={self.folder!r}: no *.py files under {root / self.folder}")
        return dict(sorted(found.items()))


@dataclass(kw_only=True)
class TextFiles(Text):
    """Local .txt, .md and .py files, a document each, and .jsonl and .parquet files, a document per row.

    paths         files, folders and globs
    valid_paths   the same, held out, and taken out of `paths`; else
    valid_ratio   the share of documents held out (null: 0.05), by their hash, so that equal documents stay together
    column        where rows keep their text
    """

    paths: Sequence[str]
    valid_paths: Sequence[str] = ()
    valid_ratio: float | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_paths and self.valid_ratio is not None:
            raise ValueError(f"valid_ratio={self.valid_ratio} clashes with valid_paths={list(self.valid_paths)}")
        check_ratio(self.valid_ratio)
        _ = self._files  # patterns that match nothing are refused here

    def identity(self) -> dict[str, Any]:
        files = {split: [f"{p.suffix} {file_hash(p)}" for p in paths] for split, paths in self._files.items()}
        return {"files": files, "valid_ratio": self.valid_ratio, "column": self.column}

    def describe(self) -> dict[str, Any]:
        return {"files": sum(map(len, self._files.values()))}

    def documents(self, cache: Path) -> dict[Split, Any]:
        def read(valid: bool) -> Iterator[bytes]:
            if self.valid_paths:
                return self._read(self._files["valid" if valid else "train"], cache)
            ratio = 0.05 if self.valid_ratio is None else self.valid_ratio
            return (text for text in self._read(self._files["train"], cache) if held_out(text, ratio) == valid)

        return _generated(read, cache)

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        valid = _matches(self.valid_paths, "valid_paths")
        return {"train": [p for p in _matches(self.paths, "paths") if p not in valid], "valid": valid}

    def _read(self, paths: Sequence[Path], cache: Path) -> Iterator[bytes]:
        from datasets import load_dataset

        for path in paths:
            if path.suffix in WHOLE:
                yield path.read_bytes()
            else:
                found = load_dataset(ROWS[path.suffix], data_files=[str(path)], split="train", cache_dir=str(cache))
                yield from texts_of(only(found, self.column, path))


def held_out(text: str | bytes, ratio: float) -> bool:
    """Whether a document belongs to the held-out share, by its own hash."""
    return _hash(as_bytes(text)) < ratio * 2**64


def check_ratio(ratio: float | None) -> None:
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"valid_ratio={ratio} must lie between 0 and 1")


def compressed(data: bytes) -> dict[str, float]:
    """Bits per byte that general compressors need, as `gzip -9` and `xz -9e` do on a file."""
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / max(1, len(data)) for name, size in sizes.items()}


def only(found: Any, column: str, name: str | Path) -> Any:
    """A data set reduced to its text, in COLUMN."""
    if column not in (found.column_names or ()):
        raise ValueError(f"column={column!r}: {name} has {found.column_names}")
    return found.select_columns([column]).rename_columns({column: COLUMN} if column != COLUMN else {})


def texts_of(found: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Documents of a data set; raises ValueError where one is not text."""
    for i, row in enumerate(found):
        if not isinstance(row[COLUMN], str | bytes):
            raise ValueError(f"row {i} holds {row[COLUMN]!r:.60} where text belongs")
        yield as_bytes(row[COLUMN])


def upto(texts: Iterable[bytes], size: int) -> list[bytes]:
    """The first of the texts, `size` bytes in all."""
    found: list[bytes] = []
    for text in texts:
        found.append(text[:size])
        size -= len(found[-1])
        if not size:
            break
    return found


def _generated(read: Callable[[bool], Iterator[bytes]], cache: Path) -> dict[Split, Any]:
    """Both splits as data sets on disk."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    def rows(valid: bool) -> Iterator[dict[str, bytes]]:
        return ({COLUMN: text} for text in read(valid))

    def written(valid: bool) -> Any:
        kind, place = Features({COLUMN: Value("binary")}), str(cache / ("valid" if valid else "train"))
        return Dataset.from_generator(rows, kind, place, gen_kwargs={"valid": valid}) if any(rows(valid)) else []

    try:
        return {"train": written(False), "valid": written(True)}
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error


def _matches(patterns: Sequence[str], name: str) -> list[Path]:
    """Every file that the patterns name, once, in path order."""
    found: set[Path] = set()
    for pattern in patterns:
        hits = [Path(hit) for hit in glob(pattern, recursive=True) or [pattern]]  # noqa: PTH207  Path.glob refuses "/"
        files = [p.resolve() for hit in hits for p in (hit.rglob("*") if hit.is_dir() else [hit]) if p.is_file()]
        if not (fitting := {p for p in files if p.suffix in (*WHOLE, *ROWS)}):
            raise ValueError(f"{name}: {pattern!r} matches no file ending in {', '.join((*WHOLE, *ROWS))}")
        found |= fitting
    return sorted(found)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
