"""A tokenizer as the files from which transformers' `AutoTokenizer` makes one of the same ids and text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epigone.data.conventions import Conventions
from epigone.data.vocabularies import SPECIALS
from epigone.errors import Fault

if TYPE_CHECKING:
    import tokenizers

OWN_NAMES = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))


def export(inner: "tokenizers.Tokenizer", conventions: Conventions | None, words: bool, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

    Epigone's own tokenizers put bos before a text when transformers adds special tokens, and find none in a text
    (`split_special_tokens`). Raises Fault where the disk refuses.
    """
    described = json.loads(inner.to_str())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if conventions is None:
        described = _own(described, words)
        config |= {"split_special_tokens": True, **OWN_NAMES}
    else:
        config |= {**conventions.settings, **conventions.names}
    template = conventions.chat_template if conventions else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(described, indent=1, ensure_ascii=False), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
        if template is not None:
            (folder / "chat_template.jinja").write_bytes(template.encode())
    except OSError as error:
        raise Fault(f"cannot write tokenizer {folder}: {error.strerror}") from error


def _own(described: dict[str, Any], words: bool) -> dict[str, Any]:
    """With named special tokens, and bos before each text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": index, "content": token, **flags} for index, token in enumerate(SPECIALS)]
    bos = {"SpecialToken": {"id": SPECIALS[1], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    processor = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {SPECIALS[1]: {"id": SPECIALS[1], "ids": [1], "tokens": [SPECIALS[1]]}},
    }
    decoder = {"decoder": _PRINTED} if words else {}
    return described | {"added_tokens": added, "post_processor": processor} | decoder


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


_PRINTED: dict[str, Any] = {
    "type": "Sequence",
    "decoders": [
        {"type": "WordPiece", "prefix": "\ufdd0", "cleanup": False},
        {"type": "Fuse"},
        _replace(r'"[^"]*?\K ?"', '"'),
        _replace(r'\A[^"]*"\K |(?!\A)\G[^"]*"[^"]*"\K ', ""),
        _replace(r" (?=[.,;:?!)\]}%'’…\-/])", ""),
        _replace(r"(?<=[(\[{\-/$#]) ", ""),
    ],
}
"""`vocabularies.readable` as decoders of the `tokenizers` library: spaces first, then away with those not printed."""
