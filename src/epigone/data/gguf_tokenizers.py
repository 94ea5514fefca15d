"""The tokenizer inside a GGUF file: tokens, merges and the name of the rule by which text is cut before merging."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epigone.data.gguf_metadata import tokenizer_metadata
from epigone.data.vocabularies import byte_level
from epigone.errors import UserError

if TYPE_CHECKING:
    import tokenizers

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Types of a token in GGUF that are no plain text."""


@dataclass(frozen=True)
class Found:
    """A tokenizer as its files describe it.

    Attributes:
        inner: text to ids.
        names: special tokens by their name, such as bos_token.
        chat_template: Jinja source, or None.
        settings: further fields of `tokenizer_config.json`.
        bos: id before a text, for a tokenizer without a bos_token.
        ends: ids that end a text; with none it is eos_token.
        never: ids that are never drawn.
    """

    inner: "tokenizers.Tokenizer"
    names: dict[str, str]
    chat_template: str | None
    settings: dict[str, Any]
    bos: int | None = None
    ends: tuple[int, ...] = ()
    never: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How text is cut into words before pairs are merged, as in the `tokenizer.json` of the models that use it.

    Attributes:
        pattern: words of this regular expression; None for GPT-2's.
        digits: each digit is a word.
        whole_words: a word that is a token is not merged from pairs.
        composed: text is brought to Unicode's composed form (NFC) first.
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    composed: bool = False


_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{s}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{s}}"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CUTS: dict[str, Cut] = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "starcoder": Cut(digits=True),
    "dbrx": Cut(_WORD + r"|\p{N}{1,3}" + _REST),
    "llama-bpe": Cut(_WORD + r"|\p{N}{1,3}" + _REST, whole_words=True),
    "qwen2": Cut(_WORD + r"|\p{N}" + _REST, composed=True),
    "tekken": Cut(_CASED.replace("{s}", "") + r"|\p{N}" + _CASED_REST, whole_words=True),
    "gpt-4o": Cut(_CASED.replace("{s}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _CASED_REST),
}
"""By `tokenizer.ggml.pre`: GPT-2; SmolLM; StarCoder; OLMo 2 and Phi-4; Llama 3; Qwen 2 and 3; Mistral; Phi-4-mini."""


def read(path: Path) -> Found:
    """The tokenizer of a GGUF file. Raises UserError if it is of a kind that is not known to be read exactly."""
    values = _metadata(path)[0]
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    model, pre, tokens, merges = (said.get(name) for name in ("model", "pre", "tokens", "merges"))
    if model != "gpt2":
        raise UserError(
            f"'{path}' has a tokenizer of kind '{model}', and only 'gpt2' (byte-level BPE) can be read from GGUF: "
            "import the Hugging Face folder of the model"
        )
    if pre not in CUTS:
        raise UserError(
            f"'{path}' cuts text by '{pre or 'a rule that it does not name'}', which is none of {', '.join(CUTS)}: "
            "import the Hugging Face folder of the model"
        )
    if not tokens or merges is None or len(said.get("token_type", tokens)) != len(tokens):
        raise UserError(f"'{path}' is damaged: its tokenizer lacks tokens, their types or merges")
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    try:
        inner = _inner(tokens, merges, said.get("token_type", [1] * len(tokens)), CUTS[pre])
    except Exception as error:  # the library raises plain Exception for merges that do not fit the tokens
        raise UserError(f"'{path}' is damaged: {str(error).strip()}".split("\n")[0]) from error
    return Found(
        inner,
        {name: _token(tokens, said[f"{key}_token_id"], path) for name, key in ids.items() if f"{key}_token_id" in said},
        values.get("tokenizer.chat_template"),
        {"add_bos_token": True} if said.get("add_bos_token") else {},
        ends=tuple(said[f"{key}_token_id"] for key in ("eos", "eot", "eom") if f"{key}_token_id" in said),
    )


def digest(path: Path) -> str:
    """Of everything that the file says of its tokenizer, and of nothing else."""
    raw = _metadata(path)[1]
    return hashlib.sha256(b"".join(raw[key] for key in sorted(raw))).hexdigest()[:16]


def _metadata(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    values, raw = tokenizer_metadata(path)
    if "tokenizer.ggml.model" not in values:
        raise UserError(f"'{path}' has no tokenizer in it")
    return values, raw


def _token(tokens: list[str], index: int, path: Path) -> str:
    if not 0 <= index < len(tokens):
        raise UserError(f"'{path}': special token id {index} is none of its {len(tokens)} tokens")
    return tokens[index]


def _inner(tokens: list[str], merges: list[str], types: list[int], cut: Cut) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import AddedToken, pre_tokenizers

    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    model = tokenizers.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut.whole_words)
    inner = byte_level(model, split_words=cut.pattern is None)
    before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pattern:
        before = [pre_tokenizers.Split(tokenizers.Regex(cut.pattern), behavior="isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*before, inner.pre_tokenizer])
    if cut.composed:
        inner.normalizer = tokenizers.normalizers.NFC()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            inner.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return inner
