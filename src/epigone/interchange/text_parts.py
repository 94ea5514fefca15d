"""The language model inside a model that also sees: its part of config.json, and its tensors by their usual names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from epigone.errors import UserError
from epigone.interchange.safetensors_files import SafetensorsFolder, Tensors
from epigone.interchange.tensors import Box

INSIDE: Mapping[str, str] = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Architectures with images, and the family of the language model in their text_config."""

_OUTER_WINS = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
"""What stands in front of the language model's tensors, and what stands there without images."""
_OTHER_PARTS = tuple(
    f"{before}{part}." for before in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


@dataclass
class TextPart:
    """The language model of a folder as WeightFiles; images' weights are left where they are.

    Attributes:
        whole: the folder.
    """

    whole: SafetensorsFolder

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """text_config as a config.json of its own. Raises UserError where there is none, or one of another family."""
        outer = self.whole.config_json
        family, inner = INSIDE[outer["model_type"]], outer.get("text_config")
        if not isinstance(inner, dict) or inner.get("model_type", family) != family:
            raise UserError(
                f"'{outer['model_type']}' model with text_config={inner!r:.80}: one of '{family}' is wanted"
            )
        shared = {key: outer[key] for key in _OUTER_WINS if outer.get(key) is not None}
        kind = {"dtype": outer["dtype"], "torch_dtype": None}
        return inner | shared | {"model_type": family, "architectures": None} | kind

    @cached_property
    def tensors(self) -> Tensors:
        """Those of the language model, and those that no part of such a model has."""
        return {ours: self.whole.tensors[theirs] for ours, theirs in self._names.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        return {_inside(name): name for name in self.whole.tensors if not name.startswith(_OTHER_PARTS)}

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or the part of it in `box`, a slice with start and stop for each axis."""
        return self.whole.read(self._names[name], box)

    @property
    def licence(self) -> str | None:
        """What the folder says of its licence."""
        return self.whole.licence

    @property
    def digest(self) -> str:
        """Of the whole folder."""
        return self.whole.digest

    def checksums(self) -> dict[str, str]:
        """Of the whole folder."""
        return self.whole.checksums()


def _inside(name: str) -> str:
    for before, after in _PREFIXES.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
