"""What a published tokenizer says beside its map between text and ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epigone.models.language_model import Specials


@dataclass(frozen=True)
class Conventions:
    """How the ids of a tokenizer from elsewhere are used.

    Attributes:
        size: ids that the model has, which may be more than the tokens.
        specials: the ids that are no text.
        names: names of special tokens as chat templates know them, such as bos_token.
        chat_template: how messages become text, in Jinja; None if it does not say.
        settings: what else its `tokenizer_config.json` says of the ids that transformers' tokenizer gives.
    """

    size: int
    specials: Specials
    names: Mapping[str, str]
    chat_template: str | None
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Conventions":
        """From what JSON keeps of the dataclass."""
        listed = {name: tuple(fields["specials"][name]) for name in ("stops", "never")}
        return cls(**{**fields, "specials": Specials(**{**fields["specials"], **listed})})
