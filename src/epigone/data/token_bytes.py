"""The exact bytes of tokens, so that the tokens of two tokenizers can be laid side by side.

    pieces = of.pieces(ids)                 # bytes of each token; joined they are the text
    ids, ends = of.encode(text)             # and how many bytes have been said with each token

Known are the tokenizers that are trained here (words, byte pairs, bytes), byte-level ones (GPT-2, Llama 3, Qwen, all of
GGUF), those of SentencePiece, with a token for each byte or without (Llama 2, Gemma, T5), and plain words. Special
tokens have no bytes. A token may hold a part of a character.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from epigone.data.tokenizers import Tokenizer
from epigone.data.vocabularies import byte_alphabet, readable_pieces
from epigone.errors import UserError

SPACE = "▁"
"""How SentencePiece writes a space."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TokenBytes:
    """Bytes of the tokens of one tokenizer. Raises UserError where it is of a kind that is not known."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        described = json.loads(tokenizer.inner.to_str())
        self._kind, self._strips = _kind(described, tokenizer)

    @functools.cached_property
    def table(self) -> list[bytes]:
        """Bytes of every id as it stands inside a text; none of ids that are special or no token."""
        names = {index: token for token, index in self.tokenizer.inner.get_vocab(with_added_tokens=True).items()}
        special = self.tokenizer.special_ids
        found = [b"" if i in special or i not in names else self._bytes(names[i]) for i in range(self.tokenizer.size)]
        if self._kind == "words":
            found = [b"" if not piece else readable_pieces([piece.decode()], False)[0].encode() for piece in found]
        return found

    def pieces(self, ids: Sequence[int] | np.ndarray, start: bool = True) -> list[bytes]:
        """Bytes of each token. `start`: the first one begins a text, and does not go on with one."""
        if self._kind == "words":
            return self._words(ids, start)
        found = [self.table[int(index)] if int(index) < self.tokenizer.size else b"" for index in ids]
        first = next((place for place, piece in enumerate(found) if piece), None)
        if start and self._strips and first is not None:
            found[first] = found[first].removeprefix(b" ")
        return found

    def encode(self, text: bytes, start: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, int32, and the bytes of it that have been said with each, int64, which never fall.

        Bytes that are no text in UTF-8 have no token. A token without bytes says as many as the one before.
        """
        ids: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        for first, part in _stretches(text):
            found, said = self._encoded(part, start and first == 0)
            ids.append(found)
            ends.append(first + said)
        if not ids:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        return np.concatenate(ids), np.concatenate(ends)

    def _encoded(self, text: str, start: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, spans = self.tokenizer.encode_with_spans(text)
        pieces = self.pieces(ids, start)
        if b"".join(pieces) == text.encode():
            return ids, np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        # Text that is brought to another form first: the library knows which characters became which token.
        sizes = np.cumsum([0, *(len(character.encode()) for character in text)])
        begins, ends = sizes[spans[:, 0]], sizes[spans[:, 1]]
        shared = np.zeros(len(ids), bool)
        shared[:-1] = (spans[1:] == spans[:-1]).all(axis=1) & (begins < ends)[:-1]
        return ids, np.maximum.accumulate(np.where(shared, begins, ends).astype(np.int64))

    def _words(self, ids: Sequence[int] | np.ndarray, start: bool) -> list[bytes]:
        vanish = self.tokenizer.special_ids - {self.tokenizer.specials.unk}
        kept = [place for place, index in enumerate(ids) if int(index) not in vanish]
        shown = readable_pieces([self.tokenizer.shown(int(ids[place])) for place in kept], start)
        found = [b""] * len(ids)
        for place, piece in zip(kept, shown, strict=True):
            found[place] = piece.encode()
        return found

    def _bytes(self, token: str) -> bytes:
        """Of one token that is not special, inside a text."""
        if self._kind == "bytes":
            values = [_ALPHABET.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self._kind == "sentencepiece":
            byte = _BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        return f" {token}".encode() if self._kind == "spaced" else token.encode()


_ALPHABET = {character: byte for byte, character in enumerate(byte_alphabet())}


def common_ids(ours: TokenBytes, theirs: TokenBytes) -> np.ndarray:
    """For each id of ours the one of theirs with the same bytes, and of eos eos: int32 [V].

    -1 where they have none, and -2 for ids of ours that are no text. Of several tokens with the same bytes the first
    counts that is not made for a single byte. Of one vocabulary every id is its own.
    """
    if ours.tokenizer.vocabulary == theirs.tokenizer.vocabulary:
        ids = np.arange(ours.tokenizer.size, dtype=np.int32)
        return np.where(ids < theirs.tokenizer.size, ids, -1).astype(np.int32)
    known, found = _by_bytes(theirs), np.array([-1 if piece else -2 for piece in ours.table], np.int32)
    for piece, index in _by_bytes(ours).items():
        found[index] = known.get(piece, -1)
    found[ours.tokenizer.specials.eos] = theirs.tokenizer.specials.eos
    return found


def _by_bytes(of: TokenBytes) -> dict[bytes, int]:
    fallback = {index for token, index in of.tokenizer.inner.get_vocab().items() if _BYTE.fullmatch(token)}
    found: dict[bytes, int] = {}
    for index in sorted(range(len(of.table)), key=lambda index: (index in fallback, index)):
        if of.table[index] and index != of.tokenizer.specials.eos:
            found.setdefault(of.table[index], index)
    return found


def _kind(described: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, bool]:
    """How tokens are bytes, and whether the space before a text's first word is not the text's."""
    if tokenizer.conventions is None and described["model"]["type"] == "WordLevel":
        return "words", False
    decoder = described["decoder"] or {"type": "None"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    types = [step["type"] for step in steps]
    if types == ["ByteLevel"]:
        return "bytes", False
    if types == ["None"] and described["model"]["type"] == "WordLevel":
        return "spaced", True
    spaces = [step for step in steps if step.get("pattern") == {"String": SPACE} and step.get("content") == " "]
    if set(types) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (spaces or "Metaspace" in types):
        scheme = [step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"]
        strips = any(step["type"] == "Strip" and step["start"] for step in steps)
        return "sentencepiece", strips or any(one != "never" for one in scheme)
    raise UserError(
        f"the tokenizer '{tokenizer.name}' writes text by {' and '.join(types)}, and the bytes of its tokens are not "
        "known: take one that is byte-level or of SentencePiece"
    )


def _stretches(text: bytes) -> Iterator[tuple[int, str]]:
    """What of it is text in UTF-8, and at which byte it begins."""
    first = 0
    while first < len(text):
        try:
            yield first, text[first:].decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield first, text[first : first + error.start].decode()
            first += error.end
