import random

import numpy as np
import pytest
import tokenizers

from hybridlab.tokenizer import Tokenizer, _core

ODD = [
    "",
    "a",
    "<|bos|> text",
    "naïve — ﬁ  \t\r\n\n  x",
    "def f(x):\n    return x_1  \n\n",
    "日本語\u3000🙂 e\u0301",
    "\x00\x0c\x1c \x85",
    "café_caf éa((b(c) a1b é(",
]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train([f"def name_{i}(self, value):\n    return self.value + {i}\n" for i in range(300)], 400)


def some_bytes(n=60):
    draw = random.Random(0)
    marks = [
        b" ",
        b"\n",
        b"def",
        b"\xff",
        b"\xc3\xa9",
        b"\r",
        b"\t",
        b"_",
        b"12345",
        b"(",
        b"\xed\xa0\x80",
        b"\x0c",
        b"\xc2\xa0",
    ]
    return [b"".join(draw.choices(marks, k=draw.randrange(1, 40))) for _ in range(n)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_any_bytes_come_back_exactly_and_are_counted_exactly(kind, bpe):
    tokenizer = Tokenizer.from_bytes() if kind == "bytes" else bpe
    for data in [t.encode() for t in ODD] + some_bytes() + [bytes(range(256))]:
        ids = tokenizer.encode(data)
        assert tokenizer.decode_bytes(ids) == data
        assert int(tokenizer.token_bytes[ids].sum()) == len(data)
        assert tokenizer.bos not in ids
    assert int(tokenizer.token_bytes[tokenizer.bos]) == 0


def test_text_comes_back_and_what_is_not_utf8_is_shown_as_replaced(bpe):
    assert [bpe.decode(bpe.encode(text)) for text in ODD] == ODD
    assert bpe.decode(bpe.encode(b"a\xffb")) == "a\ufffdb"
    assert bpe.decode([bpe.bos, *bpe.encode("x")]) == "x"


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.from_bytes()
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.encode(b"\x00a\xff")) == (257, 256, [0, 97, 255])


def test_a_stream_says_what_decode_says_and_never_half_a_character(bpe):
    text = "é日🙂 x" * 3
    stream = bpe.stream()
    said = [stream.push(i) for i in bpe.encode(text)]
    assert "".join(said) + stream.finish() == text and not any("\ufffd" in piece for piece in said)
    assert stream.push(bpe.encode("é".encode()[:1])[0]) + stream.finish() == "\ufffd"


def test_equal_texts_give_an_equal_tokenizer_and_a_file_brings_it_back(bpe, tmp_path):
    texts = [f"def name_{i}(self, value):\n    return self.value + {i}\n" for i in range(300)]
    again = Tokenizer.train(texts, 400)
    assert again.fingerprint == bpe.fingerprint and Tokenizer.train(texts, 401).fingerprint != bpe.fingerprint
    bpe.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.fingerprint, loaded.bos, loaded.vocab_size) == (bpe.fingerprint, bpe.bos, 400)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.encode_batch(ODD), bpe.encode_batch(ODD), strict=True))


def test_a_foreign_byte_level_file_keeps_its_own_document_start(tmp_path):
    core = tokenizers.Tokenizer.from_str(Tokenizer.from_bytes()._core.to_str().replace("<|bos|>", "<|endoftext|>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.decode(tokenizer.encode("<|endoftext|>"))) == (
        257, 256, "<|endoftext|>",
    )  # fmt: skip


def test_files_that_are_not_byte_level_or_rewrite_text_are_refused(bpe, tmp_path):
    wrong = tmp_path / "t.json"
    with pytest.raises(ValueError, match="no tokenizer file .*t.json"):
        Tokenizer.load(wrong)
    wrong.write_text("{}")
    with pytest.raises(ValueError, match="t.json is not a tokenizer file"):
        Tokenizer.load(wrong)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "日": 1}, unk_token="a")).save(str(wrong))
    with pytest.raises(ValueError, match="not byte-level|of the 256 bytes"):
        Tokenizer.load(wrong)
    core = tokenizers.Tokenizer.from_str(bpe._core.to_str())
    core.normalizer = tokenizers.normalizers.NFC()
    core.save(str(wrong))
    with pytest.raises(ValueError, match="does not return text exactly"):
        Tokenizer.load(wrong)
    with pytest.raises(ValueError, match="of the 256 bytes"):
        Tokenizer(_core({"a": 0}))


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256"):
        Tokenizer.train(["abc"], 256)
    with pytest.raises(ValueError, match=r"vocab_size=5000, but .* lower it"):
        Tokenizer.train(["abc abc"], 5000)
