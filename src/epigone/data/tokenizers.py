"""Text to token ids and back: bytes, trained byte-level BPE, or words. Special ids are 0 pad, 1 bos, 2 eos, 3 unk."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epigone.errors import Fault, UserError

if TYPE_CHECKING:
    import tokenizers

# U+27E8 is no character of the byte alphabet and never stands inside a word, so no text, not even one that is full of
# these very strings, can be cut into a piece that looks like a special token.
SPECIALS = ("⟨pad⟩", "⟨bos⟩", "⟨eos⟩", "⟨unk⟩")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""How an unknown word is written: itself never a known word, so that decoded text encodes to the same ids."""

_WORD = r"\w+(?:['’]\w+)*|[^\w\s]"
_BYTES = 256


@dataclass(frozen=True)
class Bytes:
    """Each UTF-8 byte is a token; nothing is trained."""

    def build(self, texts: Iterable[str] = ()) -> "Tokenizer":
        """The 260 tokens are the same for every text, so `texts` is not read."""
        import tokenizers

        vocabulary = {token: index for index, token in enumerate((*SPECIALS, *_byte_alphabet()))}
        return Tokenizer(_byte_level(tokenizers.models.BPE(vocab=vocabulary, merges=[]), split_words=False))


@dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding: every text can be encoded, and decodes to itself.

    Attributes:
        vocab_size: Number of tokens, with the 4 specials and the 256 bytes; a small text may give fewer.
    """

    vocab_size: int = 4096

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """Train on `texts`. Raises UserError if `vocab_size` has no room for the bytes."""
        import tokenizers

        if self.vocab_size < len(SPECIALS) + _BYTES:
            raise UserError(f"BPE vocab_size {self.vocab_size} < {len(SPECIALS) + _BYTES} (4 specials and 256 bytes)")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=_byte_alphabet(),
            show_progress=False,
        )
        inner = _byte_level(tokenizers.models.BPE(), split_words=True)
        inner.train_from_iterator(_encodable(texts), trainer)
        return Tokenizer(_without_added_tokens(inner))


@dataclass(frozen=True)
class Words:
    """Words and single punctuation marks are tokens; a word outside the vocabulary becomes unk.

    Attributes:
        max_size: Largest number of tokens, with the 4 specials; the most frequent words stay. None: no limit.
        min_count: A word seen fewer times than this in the training text is unknown.
        lowercase: Whether text is lower-cased first.
    """

    max_size: int | None = None
    min_count: int = 1
    lowercase: bool = True

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """Collect the words of `texts`. Raises UserError if none is left."""
        import tokenizers

        if self.max_size is not None and self.max_size <= len(SPECIALS):
            raise UserError(f"Words max_size {self.max_size} leaves no word: 4 tokens are special")
        trainer = tokenizers.trainers.WordLevelTrainer(
            vocab_size=self.max_size or 2**31,
            min_frequency=self.min_count,
            special_tokens=list(SPECIALS),
            show_progress=False,
        )
        inner = _word_level(self.lowercase)
        inner.train_from_iterator(_encodable(text.replace(UNKNOWN, " ") for text in texts), trainer)
        if inner.get_vocab_size() == len(SPECIALS):
            raise UserError(f"no word occurs {self.min_count} times in the training text: the vocabulary is empty")
        return Tokenizer(_without_added_tokens(inner))


class Tokenizer:
    """A fixed map between text and ids; made by `Bytes`, `BPE` or `Words`, or by `Tokenizer.load`."""

    def __init__(self, inner: "tokenizers.Tokenizer"):
        self.inner = inner
        self._json = _canonical_json(inner)
        self._words = json.loads(self._json)["model"]["type"] == "WordLevel"
        self.size: int = inner.get_vocab_size()
        self.identity: str = hashlib.sha256(self._json.encode()).hexdigest()[:16]

    @functools.cached_property
    def name(self) -> str:
        """Kind and size, such as 'words-6244'."""
        merges = json.loads(self._json)["model"].get("merges")
        return f"{'words' if self._words else 'bpe' if merges else 'bytes'}-{self.size}"

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32, without bos or eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Readable text. Specials vanish, except an unknown word, which is written as U+FFFD.

        Of words, `encode(decode(ids))` gives `ids` back. Of bytes and BPE, `decode(encode(text))` gives `text` back.
        """
        kept = [int(index) for index in ids]
        if self._words:
            return _readable([UNKNOWN if index == 3 else self.token(index) for index in kept if index >= 3])
        return self.inner.decode([index for index in kept if index >= len(SPECIALS)], skip_special_tokens=False)

    def token(self, index: int) -> str:
        """The token as it is shown to a reader. Raises UserError if there is no such id."""
        token = self.inner.id_to_token(int(index)) if index >= 0 else None
        if token is None:
            raise UserError(f"token id {index} is outside the tokenizer '{self.name}' of {self.size} tokens")
        return token if self._words or index < len(SPECIALS) else self.inner.decode([int(index)])

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` as the `tokenizers` library reads it; it is there whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self._json, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise Fault(f"cannot write tokenizer {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Open what `save` wrote. Raises Fault if the file is missing, damaged or not one of ours."""
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise Fault(f"cannot read tokenizer {path}: {error.strerror}") from error
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            raise Fault(f"tokenizer {path} is damaged ({_first_line(error)}): delete it and build it again") from error
        if tuple(inner.id_to_token(index) for index in range(len(SPECIALS))) != SPECIALS:
            raise Fault(f"tokenizer {path} is foreign: ids 0 to 3 are not pad, bos, eos and unk")
        return cls(inner)


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte value (GPT-2's table), in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(_BYTES + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(_BYTES)]


def _byte_level(model: Any, split_words: bool) -> "tokenizers.Tokenizer":
    import tokenizers

    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def _word_level(lowercase: bool) -> "tokenizers.Tokenizer":
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={}, unk_token=SPECIALS[3]))
    if lowercase:
        inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    return inner


def _without_added_tokens(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Trainers register specials as strings to be found in any text; here they are ids only."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(inner.to_str()) | {"added_tokens": []}))


def _canonical_json(inner: "tokenizers.Tokenizer") -> str:
    return json.dumps(json.loads(inner.to_str()), sort_keys=True, ensure_ascii=False)


def _encodable(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text contains half a character (a lone surrogate) at {error.start}") from error
        yield text


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


_NO_SPACE_BEFORE = frozenset(".,;:?!)]}%’'…-/")
_NO_SPACE_AFTER = frozenset("([{-/$#")


def _readable(tokens: Sequence[str]) -> str:
    """Join words and marks as they are printed; each double quote opens or closes in turn."""
    pieces: list[str] = []
    glued, quoted = True, False
    for token in tokens:
        closes = token == '"' and quoted
        pieces.append(token if glued or closes or token in _NO_SPACE_BEFORE else f" {token}")
        glued = token in _NO_SPACE_AFTER or (token == '"' and not quoted)
        quoted ^= token == '"'
    return "".join(pieces)
