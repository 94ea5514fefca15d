"""Tokenizers of published models, with their special tokens and templates: Hugging Face folders and GGUF files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epigone.data import gguf_tokenizers
from epigone.data.conventions import Conventions
from epigone.data.tokenizers import Tokenizer
from epigone.errors import UserError
from epigone.models.language_model import Specials

if TYPE_CHECKING:
    import tokenizers

INNER = "tokenizer.json"
"""What must be there; the files beside it say how it is used."""

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that have a name in `tokenizer_config.json`."""

SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "model_max_length",
    "additional_special_tokens",
    "extra_special_tokens",
)
"""Fields of `tokenizer_config.json` that an export gives on."""


@dataclass(frozen=True)
class PretrainedTokenizer:
    """The tokenizer of a model that was trained elsewhere, as it is configured.

    Attributes:
        path: a Hugging Face folder or a .gguf file; what is in it counts, not where it lies.
        digest: of the tokenizer's own files.
        vocab_size: ids that the model has, with those that no token uses.
        bos: the token that is read before every document; None for the one that the tokenizer names.
    """

    path: str = field(compare=False, metadata={"identity": False})
    digest: str
    vocab_size: int
    bos: str | None = None

    def build(self) -> Tokenizer:
        """Read the files. Raises UserError if they are gone, damaged or no longer the same, or do not fit the model."""
        path = Path(self.path)
        if _digest(path) != self.digest:
            raise UserError(f"the tokenizer in '{path}' is no longer the one that was imported: import it again")
        if path.is_file():
            found = gguf_tokenizers.read(path)
        else:
            found = gguf_tokenizers.Found(_inner(path / INNER), **_said(path))
        names = found.names | ({"bos_token": self.bos} if self.bos else {})
        inner = found.inner
        _register(inner, names, path)
        specials = _specials(inner, names, found, self.vocab_size, path)
        _check_ids(inner, self.vocab_size, path)
        return Tokenizer(inner, Conventions(self.vocab_size, specials, names, found.chat_template, found.settings))


def pretrained_tokenizer(path: Path, vocab_size: int, bos: str | None = None) -> PretrainedTokenizer:
    """The config of the tokenizer that lies beside a model's weights.

    Args:
        path: a Hugging Face folder or a .gguf file.
        vocab_size: ids that the model has.
        bos: the token to be read before every document; by default the one that the tokenizer names.

    Raises UserError if there is no tokenizer that can be read.
    """
    path = Path(path).expanduser().resolve()
    return PretrainedTokenizer(str(path), _digest(path), vocab_size, bos)


def _digest(path: Path) -> str:
    if path.is_file():
        return gguf_tokenizers.digest(path)
    if not (path / INNER).is_file():
        known = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (path / name).is_file()]
        has = f"has {known[0]} and no tokenizer.json" if known else "has no tokenizer.json"
        raise UserError(
            f"'{path}' {has}: load it with transformers' AutoTokenizer and save_pretrained a fast tokenizer"
        )
    said = json.dumps(_said(path), sort_keys=True).encode()
    return hashlib.sha256((path / INNER).read_bytes() + said).hexdigest()[:16]


def _said(path: Path) -> dict[str, Any]:
    """What the files beside tokenizer.json say of its use: all of `Found` but the map between text and ids.

    A model stops where its generation config says, or else its config, or else at the tokenizer's eos_token.
    """
    config = _json(path / "tokenizer_config.json")
    try:
        generation = _json(path / "generation_config.json") or _ids_of_config(_json(path / "config.json"))
        given = _json(path / "special_tokens_map.json") | config
        ends = generation.get("eos_token_id")
        names = {name: _content(given[name]) for name in NAMES if given.get(name)}
        found: dict[str, Any] = {
            "names": names,
            "chat_template": _chat_template(path, config),
            "settings": {name: _settled(config[name]) for name in SETTINGS if config.get(name) is not None},
            "bos": generation.get("bos_token_id"),
            "ends": tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
            "never": tuple(generation.get("suppress_tokens") or ()),
        }
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the tokenizer's files in '{path}' are damaged: {type(error).__name__} {error}") from error
    return found


def _ids_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special ids in a config.json, which count where there is no generation_config.json."""
    inner = config.get("text_config")
    return {name: config.get(name, (inner or {}).get(name)) for name in ("bos_token_id", "eos_token_id")}


def _settled(value: Any) -> Any:
    """A setting of plain values: tokens by their text."""
    if isinstance(value, list):
        return [_content(token) for token in value]
    if isinstance(value, dict):
        return {name: _content(token) for name, token in value.items()}
    return value


def _inner(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it cannot parse
        raise UserError(f"'{path}' is damaged: {str(error).strip()}".split("\n")[0]) from error
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None):  # a tokenizer in training; text has one encoding here
        inner.model.dropout = None
    return inner


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' is damaged: it holds no object")
    return found


def _content(token: Any) -> str:
    """A special token's text, which may stand alone or with flags."""
    return str(token["content"] if isinstance(token, dict) else token)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own comes before the config's; of several named ones, the default."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"'{path / 'tokenizer_config.json'}' has a chat_template that is no text: {template!r:.60}")
    return template


def _register(inner: "tokenizers.Tokenizer", names: Mapping[str, str], path: Path) -> None:
    """Make special what the names say is special, as transformers does; every name must have an id."""
    import tokenizers

    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    for name, token in names.items():
        if inner.token_to_id(token) is None:
            raise UserError(f"'{path}': {name} '{token}' is no token of the tokenizer: correct tokenizer_config.json")
        if token not in known:
            inner.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])


def _specials(
    inner: "tokenizers.Tokenizer", names: Mapping[str, str], found: gguf_tokenizers.Found, size: int, path: Path
) -> Specials:
    """The ids that are no text; bos is eos where there is none, and pad likewise."""
    vocabulary = inner.get_vocab()
    ids = {name: vocabulary[token] for name, token in names.items()}
    ends = list(found.ends) or ([ids["eos_token"]] if "eos_token" in ids else [])
    if not ends:
        raise UserError(f"'{path}' names no eos_token: say in tokenizer_config.json which token ends a text")
    if not all(isinstance(index, int) for index in (*ends, *found.never)):
        raise UserError(f"'{path}': eos_token_id {ends}, suppress_tokens {list(found.never)}: ids are wanted")
    eos = ids["eos_token"] if ids.get("eos_token") in ends else ends[0]
    bos = ids.get("bos_token", eos if found.bos is None else found.bos)
    stops = tuple(dict.fromkeys(end for end in ends if end != eos))
    specials = Specials(ids.get("pad_token", eos), bos, eos, ids.get("unk_token"), stops, found.never)
    for index in (specials.pad, bos, eos, *stops, *found.never):
        if not isinstance(index, int) or not 0 <= index < size:
            raise UserError(f"'{path}': special token id {index} is none of the model's {size} ids")
    return specials


def _check_ids(inner: "tokenizers.Tokenizer", size: int, path: Path) -> None:
    """Every id that plain text can have must be one of the model's."""
    special = {index for index, token in inner.get_added_tokens_decoder().items() if token.special}
    beyond = [(index, token) for token, index in inner.get_vocab().items() if index >= size and index not in special]
    if beyond:
        index, token = min(beyond)
        raise UserError(f"'{path}': token '{token}' has id {index}, and the model has only {size} ids")
