"""What Epigone's own tokenizers are made of: bytes as characters, words as they are cut and as they are printed."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from epigone.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# U+27E8 is no character of the byte alphabet and never stands inside a word, so no text, not even one that is full of
# these very strings, can be cut into a piece that looks like a special token.
SPECIALS = ("⟨pad⟩", "⟨bos⟩", "⟨eos⟩", "⟨unk⟩")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""How an unknown word is written: itself never a known word, so that decoded text encodes to the same ids."""

BYTES = 256
_WORD = r"\w+(?:['’]\w+)*|[^\w\s]"


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte value (GPT-2's table), in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(BYTES + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(BYTES)]


def byte_level(model: Any, split_words: bool) -> "tokenizers.Tokenizer":
    """A tokenizer of `model` over the characters of `byte_alphabet`."""
    import tokenizers

    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def word_level(lowercase: bool) -> "tokenizers.Tokenizer":
    """An untrained tokenizer of words and single marks."""
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={}, unk_token=SPECIALS[3]))
    if lowercase:
        inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    return inner


def without_added_tokens(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Trainers register specials as strings to be found in any text; here they are ids only."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(inner.to_str()) | {"added_tokens": []}))


def encodable(texts: Iterable[str]) -> Iterable[str]:
    """The texts. Raises UserError at one that is no UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text contains half a character (a lone surrogate) at {error.start}") from error
        yield text


_NO_SPACE_BEFORE = frozenset(".,;:?!)]}%’'…-/")
_NO_SPACE_AFTER = frozenset("([{-/$#")


def readable(tokens: Sequence[str]) -> str:
    """Join words and marks as they are printed; each double quote opens or closes in turn."""
    return "".join(readable_pieces(tokens))


def readable_pieces(tokens: Sequence[str], start: bool = True) -> list[str]:
    """Each with the space that is printed before it. `start`: the first one begins a text."""
    pieces: list[str] = []
    glued, quoted = start, False
    for token in tokens:
        closes = token == '"' and quoted
        pieces.append(token if glued or closes or token in _NO_SPACE_BEFORE else f" {token}")
        glued = token in _NO_SPACE_AFTER or (token == '"' and not quoted)
        quoted ^= token == '"'
    return pieces
