"""Weights that others trained: a Hugging Face folder of safetensors, or a GGUF file.

    files = open_weights(Path("SmolLM2-135M"))
    files.config_json, files.tensors, files.read("model.norm.weight")

Opening reads headers alone, and refuses whatever does not fit together: then an import cannot fail half way. Nothing is
unpickled.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from epigone.errors import UserError
from epigone.interchange.huggingface import find_family, read_config, tensor_plan
from epigone.interchange.safetensors_files import PICKLES, SafetensorsFolder, Tensors
from epigone.interchange.tensors import Box, Tensor, check_tensors
from epigone.interchange.text_parts import INSIDE, TextPart
from epigone.models.config import DecoderConfig

HEAD = "lm_head.weight"
_ROWS = 1024


class WeightFiles(Protocol):
    """Weights on disk, under the names that transformers gives them."""

    @property
    def config_json(self) -> dict[str, Any]:
        """The model's config.json; its dtype is that of the tensors."""
        ...

    @property
    def tensors(self) -> Tensors:
        """Shape and type of each tensor, in the order in which they are best read."""
        ...

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or the part of it in `box`, a slice with start and stop for each axis."""
        ...

    @property
    def licence(self) -> str | None:
        """What the files say of their licence."""
        ...

    @property
    def digest(self) -> str:
        """Hash of config, tokenizer, headers and weights; of files above 1 GiB, samples of the weights."""
        ...

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file that is read, by name."""
        ...


def open_weights(path: Path) -> WeightFiles:
    """The weights in a folder (config.json with safetensors, one file or shards with an index) or in a .gguf file.

    Of a model that also sees, those of its language model (text_parts.py). A tied model may have an output head of its
    own in its files: it is dropped where it equals the embeddings. Where it does not, it is the head, with a warning,
    as in transformers.

    Raises:
        UserError: one line for whatever cannot be used: no such path, pickles, a truncated or absent shard, an unknown
            architecture or field, a tensor that is missing, unknown, of another shape or type than the config says.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise UserError(f"'{path}' is a pickle, which may run any program: save the model as safetensors")
    files: WeightFiles
    if path.suffix.lower() == ".gguf":
        from epigone.interchange.gguf_files import GGUFFile

        files = GGUFFile(path)
    else:
        folder = SafetensorsFolder(path)
        files = TextPart(folder) if str(folder.config_json.get("model_type")) in INSIDE else folder
    try:
        _check(files)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    return files


def plan_of(files: WeightFiles, config: DecoderConfig) -> tuple[Tensor, ...]:
    """The tensors that a model has in these files."""
    return _plan(files.config_json, files.tensors, config)


def _plan(values: Mapping[str, Any], tensors: Tensors, config: DecoderConfig) -> tuple[Tensor, ...]:
    family = find_family(values)
    return tensor_plan(config, family, bare=not any(name.startswith(family.prefix) for name in tensors))


def check_fits(files: WeightFiles, config: DecoderConfig) -> None:
    """Refuse a config that is not that of these files. Raises UserError for the first tensor that does not fit."""
    if config.layers > len(files.tensors):
        raise UserError(f"the config has {config.layers} layers, and the files {len(files.tensors)} tensors")
    shapes = {name: shape for name, (shape, _) in files.tensors.items()}
    spare = (*find_family(files.config_json).spare, *((re.escape(HEAD),) if config.tied else ()))
    check_tensors(plan_of(files, config), shapes, spare)


def _check(files: WeightFiles) -> None:
    values = files.config_json
    config = read_config(values)
    if config.tied and HEAD in files.tensors and _head_differs(files, config):
        warnings.warn(f"tie_word_embeddings is set and {HEAD} is no copy of the embeddings: it is used", stacklevel=3)
        values["tie_word_embeddings"] = False
        config = read_config(values)
    check_fits(files, config)


def _head_differs(files: WeightFiles, config: DecoderConfig) -> bool:
    table = plan_of(files, config)[0]
    if files.tensors.get(table.name) != files.tensors[HEAD]:
        return table.name in files.tensors
    rows, columns = table.shape
    for start in range(0, rows, _ROWS):
        box = (slice(start, min(start + _ROWS, rows)), slice(0, columns))
        if not np.array_equal(files.read(table.name, box), files.read(HEAD, box)):
            return True
    return False
