"""Text to token ids and back, exactly: plain bytes, a BPE over bytes, or a byte-level tokenizer file from elsewhere."""

import codecs
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor

_BOS = "<|bos|>"
_BOS_NAMES = (_BOS, "<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>", "[BOS]")
# a word with one sign or blank before it; up to 3 digits; signs; blanks but the last before a word; blanks
_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^ \t\r\n\p{L}\p{N}]+|[ \t\r\n]+(?![^ \t\r\n])|[ \t\r\n]+"
_PROBE = "def f(x):\n\treturn  'e\u0301 é' \r\n  ﬁ\u00a0ſ  "
_ESCAPED = re.compile("([\udc80-\udcff]+)")  # what surrogateescape makes of bytes that are not UTF-8


class DataError(ValueError):
    """Data, or what was prepared from them, cannot be used as they are."""


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies -> the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Tokenizer:
    """Byte-level tokens: any bytes come back exactly, and no text encodes to the id `bos`, which opens a document.

    token_bytes  int64 [vocab]   bytes that each id stands for; 0 for special tokens
    Refuses a vocabulary that lacks one of the 256 bytes, or that rewrites text before encoding it.
    """

    def __init__(self, core: tokenizers.Tokenizer, name: str = "tokenizer") -> None:
        names = [t.content for t in core.get_added_tokens_decoder().values() if t.special]
        bos = next((n for n in _BOS_NAMES if n in names), _BOS)
        core.add_special_tokens([AddedToken(bos, special=True, normalized=False)])
        core.encode_special_tokens = True  # the text "<|bos|>" is text
        self._core = core
        self.bos: int = core.get_vocab()[bos]
        self.vocab_size: int = core.get_vocab_size()
        self._bytes = self._read_bytes(name)
        self.token_bytes: Tensor = torch.tensor([len(b) for b in self._bytes])
        of_byte = {b: i for i, b in enumerate(self._bytes) if len(b) == 1}
        if len(of_byte) < 256:
            raise ValueError(f"{name} has tokens for {len(of_byte)} of the 256 bytes; only byte-level vocabularies fit")
        self._of_byte = np.array([of_byte[bytes([b])] for b in range(256)], dtype=np.uint32)
        if (again := self.decode(self.encode(_PROBE))) != _PROBE:
            raise ValueError(f"{name} does not return text exactly ({again!r} for {_PROBE!r})")

    @classmethod
    def from_bytes(cls) -> "Tokenizer":
        """256 bytes, then the document start: vocab_size 257."""
        return cls(_core({char: byte for char, byte in _alphabet().items()}))

    @classmethod
    def train(cls, texts: Iterable[str | bytes], vocab_size: int) -> "Tokenizer":
        """BPE on `texts`, document start included in `vocab_size`. Equal texts give an equal tokenizer."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size}: 256 bytes and a document start need at least 257")
        core, alphabet = _core({}), pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator((as_bytes(t).decode("utf-8", "ignore") for t in texts), trainer)
        self = cls(core)
        if self.vocab_size != vocab_size:
            raise DataError(f"vocab_size={vocab_size}, but the text given yields {self.vocab_size} tokens; lower it")
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """A `tokenizer.json`. A document start is added where the file names none of the usual ones."""
        if not Path(path).is_file():
            raise ValueError(f"there is no tokenizer file {path}")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        return cls(core, str(path))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._core.to_str(), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._core.to_str().encode()).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of one text, without the document start."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Ids of each text, uint32 [tokens], computed in parallel. Bytes that are not UTF-8 become one token each."""
        raw = [as_bytes(text) for text in texts]
        if int(self.token_bytes.max()) == 1:
            return [self._single(data) for data in raw]
        # valid text at even places, escaped bytes between
        pieces = [_ESCAPED.split(data.decode("utf-8", "surrogateescape")) for data in raw]
        valid = self._core.encode_batch_fast([p for doc in pieces for p in doc[::2]], add_special_tokens=False)
        ids = (np.array(encoding.ids, np.uint32) for encoding in valid)
        return [
            np.concatenate([self._single(as_bytes(p)) if i % 2 else next(ids) for i, p in enumerate(doc)])
            for doc in pieces
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out, and what is not UTF-8 is shown as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[int(i)] for i in ids)

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time and holds back characters that are not complete."""
        return TextStream(self)

    def _single(self, data: bytes) -> np.ndarray:
        return self._of_byte[np.frombuffer(data, np.uint8)]

    def _read_bytes(self, name: str) -> list[bytes]:
        """Bytes of every id."""
        alphabet, added = _alphabet(), self._core.get_added_tokens_decoder()
        table = {i: b"" if token.special else token.content.encode() for i, token in added.items()}
        for token, i in self._core.get_vocab(with_added_tokens=False).items():
            if not set(token) <= alphabet.keys() and i not in added:
                raise ValueError(f"{name} is not byte-level: {token!r} does not stand for bytes")
            table.setdefault(i, bytes(alphabet.get(char, 0) for char in token))
        if len(table) != self.vocab_size or max(table) >= self.vocab_size:
            raise ValueError(f"{name} has ids up to {max(table)} for {self.vocab_size} tokens")
        return [table[i] for i in range(self.vocab_size)]


class TextStream:
    """Text from ids as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that is complete with this id, perhaps empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What remains, incomplete characters as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _core(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, as_characters])
    core.decoder = decoders.ByteLevel()
    return core


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8, where escaped bytes become themselves and lone surrogates what they would be."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
