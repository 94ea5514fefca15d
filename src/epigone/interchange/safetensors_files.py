"""A Hugging Face folder: config.json and safetensors, in one file or in shards with an index."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from epigone.errors import UserError
from epigone.interchange.digests import update_with_samples
from epigone.interchange.tensors import Box
from epigone.storage.folders import checksum

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_KEPT = 8 << 20

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]


@dataclass
class SafetensorsFolder:
    """Weights in a folder; one shard is open at a time.

    Attributes:
        path: the folder.
    """

    path: Path
    _shard: tuple[str, Any] | None = field(default=None, init=False, repr=False)
    _mapped: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.path / "config.json").is_file():
            raise UserError(f"'{self.path}' is no folder with config.json and safetensors, and no .gguf file")
        _ = self.config_json

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """config.json with the type that the tensors have: the only one, or float32 where there are several."""
        kinds = {kind.name for _, kind in self.tensors.values()}
        values = read_json(self.path / "config.json")
        return values | {"dtype": kinds.pop() if len(kinds) == 1 else "float32", "torch_dtype": None}

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        if not (self.path / INDEX).is_file():
            return (self._single(),)
        names = sorted(set(self._index.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"'{self.path / INDEX}' names {name!r}: shards are .safetensors files beside it")
            if not (self.path / name).is_file():
                raise UserError(f"'{self.path / INDEX}' names {name}, and there is no such file")
        return tuple(names)

    @cached_property
    def _index(self) -> dict[str, str]:
        """The shard of each tensor; empty where there is one file."""
        index = self.path / INDEX
        where = read_json(index).get("weight_map") if index.is_file() else {}
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise UserError(f"'{index}' is no index of shards: its weight_map should give a file for each tensor")
        return where

    def _single(self) -> str:
        found = sorted(path.name for path in self.path.glob("*.safetensors"))
        if SINGLE in found or len(found) == 1:
            return SINGLE if SINGLE in found else found[0]
        pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLES)
        if pickles and not found:
            raise UserError(f"'{self.path}' holds pickles ({pickles[0]}), which may run any program: save safetensors")
        what = f"{len(found)} safetensors files and no index" if found else "no safetensors"
        raise UserError(f"'{self.path}' holds {what}: {SINGLE}, or shards with {INDEX}, are wanted")

    @cached_property
    def tensors(self) -> Tensors:
        """Shape and type of each tensor, shard after shard and in the order in which they lie there."""
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for file in self.files:
            for name, (shape, kind) in self._header(file).items():
                if kind not in DTYPES:
                    raise UserError(f"tensor {name} of '{self.path / file}' is {kind}: known are {', '.join(DTYPES)}")
                if self._index and self._index.get(name) != file:
                    said = self._index.get(name, "in no file")
                    raise UserError(f"tensor {name} is in '{self.path / file}', and {INDEX} says that it is {said}")
                found[name] = shape, DTYPES[kind]
        for name, file in self._index.items():
            if name not in found:
                raise UserError(f"tensor {name} is missing in '{self.path / file}', where {INDEX} says that it is")
        return found

    def _header(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        shard = self._opened(file)
        parts = {name: shard.get_slice(name) for name in shard.offset_keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}

    def _opened(self, file: str) -> Any:
        if self._shard is None or self._shard[0] != file:
            self._shard = None
            try:
                self._shard = file, safe_open(self.path / file, framework="np")
            except (SafetensorError, OSError) as error:
                raise UserError(f"'{self.path / file}' is truncated, or no safetensors file ({error})") from None
        return self._shard[1]

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or the part of it in `box`, a slice with start and stop for each axis."""
        shape = self.tensors[name][0]
        part = self._opened(self._index.get(name, self.files[0])).get_slice(name)
        array = part[tuple(slice(0, size) for size in shape) if box is None else box]
        self._mapped += array.nbytes
        if self._mapped > _KEPT:  # what was read stays mapped, and counts as memory, until the shard is closed
            self._shard, self._mapped = None, 0
        return array

    @cached_property
    def licence(self) -> str | None:
        """The licence in the front matter of README.md."""
        card = self.path / "README.md"
        head = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.S) if card.is_file() else None
        said = dict(re.findall(r"^(license\w*):\s*['\"]?([^'\"\n]+?)['\"]?\s*$", head[1], re.M)) if head else {}
        return said.get("license_name", said.get("license"))

    @cached_property
    def digest(self) -> str:
        """Hash of config, tokenizer, headers, and samples of the weights; any training changes it."""
        digest = hashlib.sha256()
        for name in self._beside:
            digest.update(f"{name} {checksum(self.path / name)}\n".encode())
        for name in self.files:
            digest.update(f"{name} {self._header(name)}\n".encode())
            update_with_samples(digest, self.path / name)
        return digest.hexdigest()

    def checksums(self) -> dict[str, str]:
        """SHA-256 of config, tokenizer and weights, by file."""
        return {name: checksum(self.path / name) for name in (*self._beside, *self.files)}

    @property
    def _beside(self) -> list[str]:
        return [name for name in _BESIDE if (self.path / name).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when there is none."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"'{path}' is no JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object")
    return values
