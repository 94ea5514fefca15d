"""Text to token ids and back. Special ids of Epigone's own tokenizers are 0 pad, 1 bos, 2 eos, 3 unk."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epigone.data import exported_tokenizers, plain_text
from epigone.data.conventions import Conventions
from epigone.data.streamed_text import StreamDecoder
from epigone.data.vocabularies import (
    BYTES,
    SPECIALS,
    UNKNOWN,
    byte_alphabet,
    byte_level,
    encodable,
    readable,
    without_added_tokens,
    word_level,
)
from epigone.errors import Fault, UserError
from epigone.models.language_model import Specials
from epigone.storage.places import write_whole

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Bytes:
    """Each UTF-8 byte is a token; nothing is trained."""

    def build(self, texts: Iterable[str] = ()) -> "Tokenizer":
        """The 260 tokens are the same for every text, so `texts` is not read."""
        import tokenizers

        vocabulary = {token: index for index, token in enumerate((*SPECIALS, *byte_alphabet()))}
        return Tokenizer(byte_level(tokenizers.models.BPE(vocab=vocabulary, merges=[]), split_words=False))


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

        if self.vocab_size < len(SPECIALS) + BYTES:
            raise UserError(f"BPE vocab_size {self.vocab_size} < {len(SPECIALS) + BYTES} (4 specials and 256 bytes)")
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=byte_alphabet(),
            show_progress=False,
        )
        inner = byte_level(tokenizers.models.BPE(), split_words=True)
        inner.train_from_iterator(encodable(texts), trainer)
        return Tokenizer(without_added_tokens(inner))


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
        inner = word_level(self.lowercase)
        inner.train_from_iterator(encodable(text.replace(UNKNOWN, " ") for text in texts), trainer)
        if inner.get_vocab_size() == len(SPECIALS):
            raise UserError(f"no word occurs {self.min_count} times in the training text: the vocabulary is empty")
        return Tokenizer(without_added_tokens(inner))


class Tokenizer:
    """A fixed map between text and ids.

    Made by `Bytes`, `BPE` or `Words`, by a `PretrainedTokenizer`, or by `Tokenizer.load`. One from elsewhere comes with
    its conventions; its text and ids are those of the `tokenizers` library, and so of transformers' fast tokenizers.

    `identity` is a hash of all of it; `vocabulary` of what gives ids their meaning alone, so that it is the same where
    models differ in padding, template or settings.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", conventions: Conventions | None = None):
        self.inner, self.conventions = inner, conventions
        described = json.loads(inner.to_str())
        model = described["model"]
        kind = "words" if model["type"] == "WordLevel" else "bpe" if model.get("merges") else "bytes"
        self._words = kind == "words" and conventions is None
        self.size: int = conventions.size if conventions else inner.get_vocab_size()
        self.name: str = f"{model['type'].lower() if conventions else kind}-{self.size}"
        whole = {"conventions": asdict(conventions), "tokenizer": described} if conventions else described
        self._json = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        self.identity: str = hashlib.sha256(self._json.encode()).hexdigest()[:16]
        self.vocabulary: str = _vocabulary(described, self.specials)

    @property
    def specials(self) -> Specials:
        """The ids that are no text."""
        return self.conventions.specials if self.conventions else Specials()

    @functools.cached_property
    def tokens(self) -> int:
        """Ids up to the last one that a token has; those behind it, up to `size`, are padding of a model's rows."""
        ids = (*self.inner.get_vocab(with_added_tokens=True).values(), self.specials.bos, self.specials.eos)
        return min(self.size, 1 + max(ids))

    @property
    def chat_template(self) -> str | None:
        """How messages become text, in Jinja."""
        return self.conventions.chat_template if self.conventions else None

    @functools.cached_property
    def _plain(self) -> "tokenizers.Tokenizer":
        return plain_text.without_specials(self.inner) if self.conventions else self.inner

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that vanish when they are decoded."""
        if self.conventions is None:
            return frozenset(range(len(SPECIALS)))
        return frozenset(index for index, token in self.inner.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """The ids of `text`, int32; no bos or eos is added.

        Args:
            text: what is encoded.
            specials: read special tokens that are spelled out in the text, as in a rendered chat. They are mere text
                otherwise, as they always are to Epigone's own tokenizers.

        Raises UserError for a special token that the model does not have.
        """
        if not (specials and self.conventions):
            return self.encode_batch([text])[0]
        ids = np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)
        if len(ids) and ids.max() >= self.size:
            raise UserError(f"the text has '{self.token(ids.max())}', id {ids.max()}; the model has {self.size} ids")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text; `runtime.prepare` says on how many cores."""
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and of each token the characters of the text that it stands for: first and end, [tokens, 2]."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray, specials: bool = False) -> str:
        """Readable text. Special tokens vanish unless `specials`; an unknown word is written as U+FFFD.

        Of words, `encode(decode(ids))` gives `ids` back. Of bytes and BPE, `decode(encode(text))` gives `text` back.
        """
        known = np.asarray(ids)
        if self._words and not specials and len(known) and 0 <= known.min() <= known.max() < len(self._printed):
            words = [self._printed[index] for index in known.tolist()]
            return readable([word for word in words if word is not None])
        kept = [int(index) for index in ids if specials or int(index) not in self.special_ids or self._unknown(index)]
        if self._words:
            return readable([self.shown(index) for index in kept])
        return self.inner.decode(kept, skip_special_tokens=False)

    @functools.cached_property
    def _printed(self) -> list[str | None]:
        """Every word as it is printed; None for what vanishes."""
        vanish = self.special_ids - {self.specials.unk}
        return [None if index in vanish else self.shown(index) for index in range(self.inner.get_vocab_size())]

    def shown(self, index: int) -> str:
        """A word as it is printed; an unknown one as U+FFFD."""
        return UNKNOWN if self._unknown(index) else self.token(index)

    def _unknown(self, index: int) -> bool:
        return self._words and index == self.specials.unk

    def stream_decoder(self) -> StreamDecoder:
        """For text that is shown while it is written."""
        return StreamDecoder(self.decode, self._may_change)

    def _may_change(self, index: int) -> bool:
        """Whether what follows can change how this id is written: bytes of one character, and what vanishes between."""
        return index in self.special_ids or bool(_BYTE.fullmatch(self.inner.id_to_token(index) or ""))

    def token(self, index: int) -> str:
        """The token as it is shown to a reader. Raises UserError if there is no such id."""
        token = self.inner.id_to_token(int(index)) if index >= 0 else None
        if token is None and (self.conventions is None or not 0 <= index < self.size):
            raise UserError(f"token id {index} is outside the tokenizer '{self.name}' of {self.size} tokens")
        if token is None:
            return f"⟨unused {index}⟩"
        if self._words or int(index) in self.special_ids:
            return token
        shown = self.inner.decode([int(index)], skip_special_tokens=False)
        return f" {shown}" if token.startswith("▁") and not shown.startswith(" ") else shown

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens spelled out, as transformers' `apply_chat_template` gives it.

        Raises UserError if there is no chat template, or if it refuses the messages or does what it must not.
        """
        from epigone.data import chat

        if self.conventions is None or self.conventions.chat_template is None:
            raise UserError(f"tokenizer '{self.name}' has no chat template: give plain text")
        return chat.render(self.conventions.chat_template, messages, self.conventions.names, add_generation_prompt)

    def save(self, path: Path) -> None:
        """Write one JSON file, whole or not at all: a `tokenizer.json` as the `tokenizers` library reads it.

        A tokenizer with conventions is an object of both.
        """
        try:
            write_whole(path, self._json.encode())
        except OSError as error:
            raise Fault(f"cannot write tokenizer {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Open what `save` wrote. Raises Fault if the file is missing, damaged or not one of ours."""
        import tokenizers

        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            conventions = Conventions.read(found["conventions"]) if "conventions" in found else None
            inner = tokenizers.Tokenizer.from_str(json.dumps(found["tokenizer"] if conventions else found))
        except OSError as error:
            raise Fault(f"cannot read tokenizer {path}: {error.strerror}") from error
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            first = str(error).strip().split("\n")[0]
            raise Fault(f"tokenizer {path} is damaged ({first}): delete it and build it again") from error
        if conventions is None and tuple(inner.id_to_token(index) for index in range(len(SPECIALS))) != SPECIALS:
            raise Fault(f"tokenizer {path} is foreign: ids 0 to 3 are not pad, bos, eos and unk")
        return cls(inner, conventions)

    def export(self, folder: Path) -> None:
        """Write the files from which transformers' `AutoTokenizer` makes a tokenizer of the same ids and text."""
        exported_tokenizers.export(self.inner, self.conventions, self._words, folder)


def _vocabulary(described: Mapping[str, Any], specials: Specials) -> str:
    """A hash of the map between text and ids, with the ids before and after a document."""
    kept = {name: value for name, value in described.items() if name not in ("post_processor", "padding", "truncation")}
    text = json.dumps([kept, specials.bos, specials.eos], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
