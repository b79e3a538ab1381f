import hashlib
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlab.data import shards
from hybridlab.data.batch import DataError
from hybridlab.data.hub import Hub
from hybridlab.data.text import PythonStdlib, TextFiles
from hybridlab.tokenizer import Tokenizer

BYTES = {"tokenizer": "bytes", "vocab_size": 257, "seq_len": 1, "batch_size": 2}


def documents(corpus, split):
    """The documents of a split as bytes, from every one of its tokens."""
    batch = corpus.rows(split, range(corpus.n_rows(split)))
    ids = batch.tokens.flatten().tolist()[:1] + batch.targets[batch.targets != -100].tolist()
    starts = [i for i, token in enumerate(ids) if token == corpus.tokenizer.bos] + [len(ids)]
    return [corpus.tokenizer.decode_bytes(ids[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def write_texts(folder, n=40):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"{i:02d}.txt").write_bytes(
            f"document {i}\r\n".encode() * (i % 4) + b"\xff\xfe" * (i % 2) + b"\n%d" % i
        )
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    source = PythonStdlib(folder="asyncio", **BYTES)
    return source.prepare(tmp_path_factory.mktemp("cache"))


def test_the_standard_library_is_split_by_the_hash_of_the_path(stdlib):
    root = Path(sysconfig.get_path("stdlib"))
    expected = {"train": [], "valid": []}
    for name in sorted(p.relative_to(root).as_posix() for p in root.glob("asyncio/**/*.py")):
        held = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 20 == 0
        expected["valid" if held else "train"].append((root / name).read_bytes())
    assert expected["valid"] and documents(stdlib, "valid") == expected["valid"]
    assert documents(stdlib, "train")[:3] == expected["train"][:3]
    facts, held = stdlib.facts, b"".join(expected["valid"])
    assert facts["files"] == len(expected["train"] + expected["valid"]) and facts["valid bytes"] == len(held)
    assert facts["bytes"] == facts["train bytes"] + facts["valid bytes"]
    assert facts["xz -9e"] == 8 * len(lzma.compress(held, preset=9 | lzma.PRESET_EXTREME)) / len(held)
    assert facts["gzip -9"] > facts["xz -9e"] > 0.5 and facts["python"].endswith(sys.version.split()[0])


def test_site_packages_and_caches_are_no_part_of_the_library():
    names = list(PythonStdlib(**BYTES)._files)
    assert "asyncio/base_events.py" in names and names == sorted(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]


@pytest.mark.long
def test_the_whole_library_prepares_with_bpe(tmp_path):
    corpus = PythonStdlib(vocab_size=4096, seq_len=512, batch_size=8).prepare(tmp_path)
    assert documents(corpus, "valid") and corpus.facts["valid bytes"] > 500_000
    assert corpus.facts["valid bytes"] / corpus.facts["valid tokens"] > 3


def test_bytes_scored_in_validation_are_the_bytes_held_out(stdlib):
    batch = stdlib.rows("valid", range(stdlib.n_rows("valid")))
    assert int(stdlib.token_bytes[batch.targets[batch.targets != -100]].sum()) == stdlib.facts["valid bytes"]


def test_documents_of_every_kind_of_file_come_back_exactly(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in/a.md").write_bytes(b"# r\xc3\xa9sum\xc3\xa9\r\n")
    (tmp_path / "in/deep/b.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "in/ignored.bin").write_bytes(b"\0")
    rows = [{"body": "one\nline é", "n": 1}, {"body": "", "n": 2}]
    (tmp_path / "in/c.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["ßparquet", "two"]}), tmp_path / "in/d.parquet")
    source = TextFiles(paths=[str(tmp_path / "in")], valid_ratio=0.5, column="body", **BYTES)
    corpus = source.prepare(tmp_path / "cache")
    whole = [b"# r\xc3\xa9sum\xc3\xa9\r\n", "one\nline é".encode(), b"", "ßparquet".encode(), b"two", b"x = '\xe9'\n"]
    train, valid = documents(corpus, "train"), documents(corpus, "valid")
    assert valid and train == [text for text in whole if text not in valid]
    assert valid == [text for text in whole if text not in train]
    wrong = TextFiles(paths=[str(tmp_path / "in/*.jsonl")], valid_ratio=0.5, column="txt", **BYTES)
    with pytest.raises(DataError, match=r"column='txt': row 0 of .*c.jsonl has None there, and \['body', 'n'\]"):
        wrong.prepare(tmp_path / "cache")


def test_a_ratio_holds_documents_out_by_their_hash_and_equal_ones_together(texts, tmp_path):
    (tmp_path / "more").mkdir()
    for path in texts.iterdir():
        (tmp_path / "more" / f"copy-{path.name}").write_bytes(path.read_bytes())
    source = TextFiles(paths=[str(texts), str(tmp_path / "more/**/*.txt")], valid_ratio=0.4, **BYTES)
    corpus = source.prepare(tmp_path / "cache")
    valid, train = documents(corpus, "valid"), documents(corpus, "train")
    assert len(valid) + len(train) == 80 and not set(valid) & set(train)
    expected = {p.read_bytes() for p in texts.iterdir()}
    assert set(valid) == {d for d in expected if int(hashlib.sha256(d).hexdigest()[:16], 16) < 0.4 * 2**64}


def test_bpe_is_trained_on_the_training_split_within_its_budget(texts, tmp_path, monkeypatch):
    given = []
    train = Tokenizer.train.__func__
    spy = classmethod(lambda cls, found, size: given.extend(found) or train(cls, found, size))
    monkeypatch.setattr(Tokenizer, "train", spy)
    options = {"vocab_size": 270, "seq_len": 1, "batch_size": 2, "tokenizer_bytes": 400, "valid_ratio": 0.4}
    corpus = TextFiles(paths=[str(texts)], **options).prepare(tmp_path)
    assert corpus.vocab_size == 270 and 400 <= sum(map(len, given)) < 400 + len(given[-1])
    assert set(given) <= set(documents(corpus, "train"))


def test_the_second_time_nothing_is_tokenized_and_a_changed_corpus_is_prepared_anew(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    source = {"paths": [str(folder)], "valid_ratio": 0.4, **BYTES}
    first = TextFiles(**source).prepare(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_split", None)
        patch.setattr(TextFiles, "texts", None)
        again = TextFiles(**source | {"seq_len": 8}).prepare(tmp_path / "cache")
    assert again.fingerprint == first.fingerprint and documents(again, "valid") == documents(first, "valid")
    (folder / "00.txt").write_text("other")
    changed = TextFiles(**source).prepare(tmp_path / "cache")
    assert changed.fingerprint != first.fingerprint
    assert TextFiles(**source | {"valid_ratio": 0.3}).prepare(tmp_path / "cache").fingerprint != changed.fingerprint


def folder_hash(home):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in home.iterdir() if p.is_file()}


def prepared(cache):
    return [p for p in cache.iterdir() if p.is_dir() and p.suffix != ".tmp"]


def test_small_shards_hold_the_same_rows(texts, tmp_path, monkeypatch):
    source = TextFiles(paths=[str(texts)], valid_ratio=0.4, **BYTES)
    whole = source.prepare(tmp_path / "a")
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    parts = source.prepare(tmp_path / "b")
    assert len(list(prepared(tmp_path / "b")[0].glob("train-*.bin"))) > 3
    rows = range(whole.n_rows("train"))
    assert torch.equal(whole.rows("train", rows).targets, parts.rows("train", rows).targets)
    copy = pickle.loads(pickle.dumps(parts))
    assert torch.equal(copy.rows("train", rows).tokens, whole.rows("train", rows).tokens)


@pytest.mark.parametrize("moment", ["write_split", "digest"])
def test_what_fails_midway_leaves_nothing_behind(texts, tmp_path, monkeypatch, moment):
    source = TextFiles(paths=[str(texts)], valid_ratio=0.4, **BYTES)
    key = source.prepare(tmp_path / "a").fingerprint

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"hybridlab.data.{'text' if moment == 'write_split' else 'shards'}.{moment}", fail)
        with pytest.raises(OSError, match="No space"):
            source.prepare(tmp_path / "b")
    assert not [path for path in (tmp_path / "b").iterdir() if path.is_dir()]
    assert source.prepare(tmp_path / "b").fingerprint == key
    assert folder_hash(prepared(tmp_path / "a")[0]) == folder_hash(prepared(tmp_path / "b")[0])


SLOW = """
import sys, time, pathlib
from hybridlab.data import text
from hybridlab.data.text import TextFiles
write = text.write_split
def slow(temp, split, *rest):
    record = write(temp, split, *rest)
    time.sleep(60)
    return record
text.write_split = slow
TextFiles(paths=[sys.argv[1]], valid_ratio=0.4, tokenizer="bytes", vocab_size=257, seq_len=16, batch_size=2).prepare(
    pathlib.Path(sys.argv[2]))
"""


def test_a_kill_midway_and_several_at_once_end_in_the_undisturbed_result(texts, tmp_path):
    options = {"paths": [str(texts)], "valid_ratio": 0.4, **BYTES}
    TextFiles(**options).prepare(tmp_path / "a")
    cache = tmp_path / "b"
    killed = subprocess.Popen([sys.executable, "-c", SLOW, str(texts), str(cache)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while not list(cache.glob("*.tmp/train-*.bin")):
            assert time.monotonic() < deadline and killed.poll() is None
            time.sleep(0.05)
        with ThreadPoolExecutor(2) as pool:
            others = [pool.submit(TextFiles(**options).prepare, cache) for _ in range(2)]
            time.sleep(0.1)
            early = prepared(cache) + [other for other in others if other.done()]
            os.kill(killed.pid, signal.SIGKILL)
            killed.wait()
        assert not early and len({other.result().fingerprint for other in others}) == 1
    finally:
        killed.kill()
    assert not list(cache.glob("*.tmp"))
    assert len(prepared(cache)) == 1 and folder_hash(prepared(cache)[0]) == folder_hash(prepared(tmp_path / "a")[0])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def rewrite_index(home, change):
    index = json.loads((home / "index.json").read_text())
    index.pop("digest")
    change(index)
    (home / "index.json").write_text(json.dumps({**index, "digest": shards.digest(index)}))


@pytest.mark.parametrize("name", ["train-00000.bin", "valid-00000.bin", "tokenizer.json", "index.json"])
@pytest.mark.parametrize("damage", [damage_flip, damage_cut, Path.unlink], ids=["flip", "cut", "missing"])
def test_damaged_files_are_refused_by_name(texts, tmp_path, name, damage):
    source = TextFiles(paths=[str(texts)], valid_ratio=0.4, **BYTES)
    source.prepare(tmp_path)
    damage(prepared(tmp_path)[0] / name)
    with pytest.raises(DataError, match=f"{name}: .* delete the folder"):
        source.prepare(tmp_path)


def test_tokens_beyond_the_vocabulary_and_other_corpora_are_refused_even_with_right_hashes(texts, tmp_path):
    source = TextFiles(paths=[str(texts)], valid_ratio=0.4, **BYTES)
    source.prepare(tmp_path)
    home = prepared(tmp_path)[0]
    good = (home / "index.json").read_text()
    rewrite_index(home, lambda index: index.update(key="0" * 64))
    with pytest.raises(DataError, match="index.json: it was made from 0000"):
        source.prepare(tmp_path)
    (home / "index.json").write_text(good)
    tokens = np.fromfile(home / "train-00000.bin", np.uint16)
    tokens[5] = 257
    tokens.tofile(home / "train-00000.bin")
    sha = hashlib.sha256(tokens).hexdigest()
    rewrite_index(home, lambda index: index["sha256"].update({"train-00000.bin": sha}))
    with pytest.raises(DataError, match="train-00000.bin: it holds token 257, but the vocabulary has 257"):
        source.prepare(tmp_path)


def test_a_data_set_by_name_is_prepared_or_streamed_with_the_same_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [f"text {i} " * (1 + i % 5) for i in range(60)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    source = {"name": str(folder), "column": "body", "valid_ratio": 0.3, **BYTES}
    corpus = Hub(**source).prepare(tmp_path / "cache")
    train, valid = documents(corpus, "train"), documents(corpus, "valid")
    assert sorted(train + valid) == sorted(line.encode() for line in lines) and len(valid) > 5
    source["seq_len"] = 16
    corpus = Hub(**source).prepare(tmp_path / "cache")
    stream = Hub(**source, streaming=True).prepare(tmp_path / "cache")
    assert documents(stream, "valid") == valid and "resume" in stream.facts["order"]
    rows = corpus.n_rows("train")
    streamed = stream.rows("train", range(2 * rows))
    assert torch.equal(streamed.tokens[:rows], corpus.rows("train", range(rows)).tokens)
    assert torch.equal(streamed.tokens[1:, 0], streamed.targets[:-1, -1])
    resumed = Hub(**source, streaming=True).prepare(tmp_path / "cache")
    assert torch.equal(resumed.rows("train", [rows + 3, rows + 5]).targets, streamed.targets[[rows + 3, rows + 5]])
    assert torch.equal(resumed.rows("train", [2]).tokens, streamed.tokens[[2]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PythonStdlib(vocab_size=256, seq_len=8, batch_size=1), "vocab_size=256"),
        (lambda: PythonStdlib(**BYTES | {"vocab_size": 300}), "vocab_size=300, but tokenizer=bytes has 257"),
        (lambda: PythonStdlib(**BYTES | {"tokenizer": "nowhere.json"}), "nowhere.json"),
        (lambda: PythonStdlib(**BYTES | {"seq_len": 0}), "seq_len=0"),
        (lambda: PythonStdlib(**BYTES, valid_seq_len=0), "valid_seq_len=0"),
        (lambda: PythonStdlib(**BYTES, tokenizer_bytes=0), "tokenizer_bytes=0"),
        (lambda: PythonStdlib(**BYTES, folder="nowhere").prepare(Path("unused")), "folder='nowhere'"),
        (lambda: TextFiles(paths=["/nowhere/*.md"], **BYTES), r"paths: '/nowhere/\*.md'"),
        (lambda: TextFiles(paths=["a"], valid_ratio=1.5, **BYTES), "valid_ratio=1.5"),
        (lambda: Hub(name="a", valid_ratio=0.0, **BYTES), "valid_ratio=0.0"),
    ],
)
def test_what_cannot_be_is_refused_by_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_empty_split_and_one_too_short_for_a_row_are_refused(texts, tmp_path):
    one = [str(texts / "03.txt")]
    with pytest.raises(DataError, match="no documents in the valid split"):
        TextFiles(paths=one, valid_ratio=1e-9, **BYTES).prepare(tmp_path)
    with pytest.raises(DataError, match="tokens are too few for one row of 9999"):
        TextFiles(paths=[str(texts)], valid_ratio=0.3, **BYTES | {"seq_len": 9999}).prepare(tmp_path)
