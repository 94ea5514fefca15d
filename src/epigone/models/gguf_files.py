"""Weights in a GGUF file, as llama.cpp has them: dequantised to float32, under the names that transformers gives them.

llama.cpp stores the rows of Llama's queries and keys in another order, and Gemma's norm scales with 1 added; both are
undone. Architectures are rows of a table; what is not there, or cannot be represented, is refused by name.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epigone.errors import UserError
from epigone.models.file_digests import checksum, update_with_samples
from epigone.models.huggingface_families import GEMMA2, GEMMA3, LLAMA, QWEN2, QWEN3, Family
from epigone.models.huggingface_tensors import Box
from epigone.models.rope import Llama3Scaling, frequencies
from epigone.models.safetensors_files import Tensors


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        name: in general.architecture.
        family: the Hugging Face family that it is.
        modules: names of modules in a block, and those that transformers gives them.
        turned: queries and keys have their rows in llama.cpp's order.
        raised: norm scales have 1 added.
        large: number of layers of the one model whose scores are scaled by model_size / heads (Gemma 27B).
        needed: metadata that it must have beside those that all have.
    """

    name: str
    family: Family
    modules: Mapping[str, str]
    turned: bool = False
    raised: bool = False
    large: int | None = None
    needed: tuple[str, ...] = ()


_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_MODULES = _MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ARCHITECTURES = (
    Architecture("llama", LLAMA, _MODULES, turned=True),
    Architecture("qwen2", QWEN2, _MODULES),
    Architecture("qwen3", QWEN3, _MODULES),
    Architecture("gemma2", GEMMA2, _GEMMA_MODULES, raised=True, large=46),
    Architecture("gemma3", GEMMA3, _GEMMA_MODULES, raised=True, large=62, needed=("attention.sliding_window",)),
)

_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
"""Metadata of an architecture that are keys of config.json."""
_NEEDED = (
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_CHECKED = (
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
)
_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_FREQUENCIES = "rope_freqs.weight"


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
            if name in _IDS or not name.startswith("tokenizer.")
        }
        name, known = self._metadata.get("general.architecture"), {row.name: row for row in ARCHITECTURES}
        if name not in known:
            raise UserError(f"'{path}' is of architecture {name!r}: known are {', '.join(known)}")
        if self._metadata.get("split.count", 0) > 1:
            raise UserError(
                f"'{path}' is one of {self._metadata['split.count']} parts: merge them (gguf-split --merge)"
            )
        self._row = known[name]

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """A config.json of the metadata. Raises UserError for what it cannot say."""
        given = self._given
        values = {config_key: _exact(given[key]) for key, config_key in _KEYS.items() if key in given}
        values |= {key: self._metadata[name] for name, key in _IDS.items() if name in self._metadata}
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
        unknown = sorted(given.keys() - _KEYS.keys() - set(_CHECKED))
        missing = [key for key in (*_NEEDED, *self._row.needed) if key not in given]
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
        if _FREQUENCIES in self._stored:
            return _llama3(np.array(self._dequantised(_FREQUENCIES)), values)
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
        return {_name(self._row, stored): stored for stored in self._stored if stored != _FREQUENCIES}

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
        raise UserError(f"'{path}' is truncated, or no GGUF file ({error})") from None


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
        raise UserError(f"{_FREQUENCIES} does not hold the divisors of Llama 3 (factor {factor:g}, 1, 4, 8192)")
    ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **ends}


def _shape(stored: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(stored.shape))


def _name(row: Architecture, stored: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if block and block[2] in row.modules:
        return f"model.layers.{block[1]}.{row.modules[block[2]]}.{block[3]}"
    module, _, end = stored.rpartition(".")
    return f"{_OUTER[module]}.{end}" if module in _OUTER else stored


def _order(rows: int, heads: int) -> np.ndarray:
    """Where each row lies in the file: llama.cpp puts features i and i + H/2, which turn together, side by side."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
