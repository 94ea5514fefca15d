"""Corpora are text and nothing else: no string in them may become a special token."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


def without_specials(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """The same tokenizer, to which special tokens spelled out in a text are mere characters.

    It is transformers' `split_special_tokens=True`, with two gaps closed. The library's own switch stops the search for
    special tokens in the text, but a model whose vocabulary has them (a Unigram has "</s>", at a score better than that
    of any other cut) still finds them, and so does a merge that ends in one. So the special tokens keep their ids under
    names that no pipeline can form: with a space, which byte-level alphabets, Metaspace and words do not know, and a
    code point that is no character.
    """
    import tokenizers

    described = json.loads(inner.to_str())
    hidden = {token["content"]: f" \ufdd0{token['id']}" for token in described["added_tokens"] if token["special"]}
    for token in described["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    _rename(described["model"], hidden)
    plain = tokenizers.Tokenizer.from_str(json.dumps(described | {"post_processor": None}))
    plain.encode_special_tokens = True
    return plain


def _rename(model: dict[str, Any], hidden: dict[str, str]) -> None:
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & hidden.keys()]
