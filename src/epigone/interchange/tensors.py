"""Names and layouts of Hugging Face tensors, and where each lies in the parameters of a decoder.

A family has a table of modules (`Module`); `tensor_plan` writes it out for a config: one `Tensor` for each of the file,
with the parts of our parameters that it holds. torch's linear layers store [outputs, inputs], GPT-2's Conv1D and all
tables as we do; several projections may be joined, outputs after outputs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from epigone.errors import UserError
from epigone.models.config import DecoderConfig, Weight, layer_weights, outer_weights

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Module:
    """A module of a Hugging Face model and the parameters in it.

    Attributes:
        path: its name, with {expert} where there is one for each.
        words: the first words of our parameters' names; several are joined in this order.
        turned: its matrix is [outputs, inputs].
    """

    path: str
    words: tuple[str, ...]
    turned: bool = True


@dataclass(frozen=True)
class Slot:
    """A part of one of our parameters that lies in one tensor.

    Attributes:
        name: our parameter.
        index: where the part lies on the first axes: the layer, and the expert.
        shape: its axes behind those, without padded rows.
        inputs: how many of these are inputs; 0 for biases and norms.
        start: its first output in the tensor.
    """

    name: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int
    start: int

    @property
    def outputs(self) -> int:
        """Numbers for each input."""
        return math.prod(self.shape[self.inputs :])


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        name: in the file.
        shape: in the file.
        turned: it is [outputs, inputs].
        slots: what it holds, outputs after outputs.
    """

    name: str
    shape: tuple[int, ...]
    turned: bool
    slots: tuple[Slot, ...]


def _linear(**paths: str) -> tuple[Module, ...]:
    return tuple(Module(path, tuple(words.split("+"))) for words, path in paths.items())


OUTER = (
    Module("embed_tokens", ("embedding",), turned=False),
    Module("norm", ("final_norm",)),
    Module("lm_head", ("head",), turned=False),
)
"""Outside the layers; lm_head has no prefix."""

_ATTENTION = _linear(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    mix="self_attn.o_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
_FEED_FORWARD = _linear(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_PRE_NORMS = _linear(attention_norm="input_layernorm", ff_norm="post_attention_layernorm")
_POST_NORMS = _linear(attention_post_norm="post_attention_layernorm", ff_post_norm="post_feedforward_layernorm")

LLAMA = (*_ATTENTION, *_FEED_FORWARD, *_PRE_NORMS)
OLMO2 = (*_ATTENTION, *_FEED_FORWARD, *_POST_NORMS)
GEMMA = (
    *OLMO2,
    *_linear(attention_norm="input_layernorm", ff_norm="pre_feedforward_layernorm"),
)
PHI3 = (
    Module("self_attn.qkv_proj", ("query", "key", "value")),
    Module("mlp.gate_up_proj", ("gate", "up")),
    *_linear(mix="self_attn.o_proj", down="mlp.down_proj"),
    *_PRE_NORMS,
)
QWEN3_MOE = (
    *_ATTENTION,
    *_PRE_NORMS,
    *_linear(
        router="mlp.gate",
        gate="mlp.experts.{expert}.gate_proj",
        up="mlp.experts.{expert}.up_proj",
        down="mlp.experts.{expert}.down_proj",
    ),
)
_MIXTRAL_EXPERT = "block_sparse_moe.experts.{expert}."
MIXTRAL = (
    *_ATTENTION,
    *_PRE_NORMS,
    *_linear(
        router="block_sparse_moe.gate",
        gate=_MIXTRAL_EXPERT + "w1",
        up=_MIXTRAL_EXPERT + "w3",
        down=_MIXTRAL_EXPERT + "w2",
    ),
)
GPT2_OUTER = (
    Module("wte", ("embedding",), turned=False),
    Module("wpe", ("position",), turned=False),
    Module("ln_f", ("final_norm",)),
    Module("lm_head", ("head",), turned=False),
)
GPT2 = (
    Module("ln_1", ("attention_norm",)),
    Module("attn.c_attn", ("query", "key", "value"), turned=False),
    Module("attn.c_proj", ("mix",), turned=False),
    Module("ln_2", ("ff_norm",)),
    Module("mlp.c_fc", ("up",), turned=False),
    Module("mlp.c_proj", ("down",), turned=False),
)

INVERSE_FREQUENCIES = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
"""Buffers of old files: they follow from the config."""
GPT2_BUFFERS = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)
"""The causal mask, and what it puts where it masks."""


def tensors_of(config: DecoderConfig, modules: Sequence[Module], path: str, layer: int | None) -> list[Tensor]:
    """The tensors of one layer's modules, or of those outside the layers (None). `path` begins their names."""
    weights = outer_weights(config) if layer is None else layer_weights(config)
    stems = {name.rsplit("_", 1)[0]: name for name in weights}
    found = []
    for module in modules:
        place = module.path if module.path == "lm_head" else path + module.path
        for end, forms in ((".weight", ("", "_scale")), (".bias", ("_bias",))):
            names = [stems[word + form] for word in module.words for form in forms if word + form in stems]
            if names:
                experts = range(config.experts or 1) if "{expert}" in place else [None]
                found += [_tensor(config, module, place, end, names, weights, layer, expert) for expert in experts]
    return found


def _tensor(
    config: DecoderConfig,
    module: Module,
    place: str,
    end: str,
    names: list[str],
    weights: Mapping[str, Weight],
    layer: int | None,
    expert: int | None,
) -> Tensor:
    index = tuple(i for i in (layer, expert) if i is not None)
    slots: list[Slot] = []
    for name in names:
        letters = name.rsplit("_", 1)[1]
        padded = zip(letters, weights[name].shape, strict=True)
        shape = tuple(config.vocab_size or size if letter == "V" else size for letter, size in padded)[len(index) :]
        slots.append(Slot(name, index, shape, _inputs(name), sum(slot.outputs for slot in slots)))
    inputs = [math.prod(slots[0].shape[: slots[0].inputs])] if slots[0].inputs else []
    outputs = sum(slot.outputs for slot in slots)
    sizes = (outputs, *inputs) if module.turned else (*inputs, outputs)
    return Tensor(place.format(expert=expert) + end, sizes, module.turned, tuple(slots))


def _inputs(name: str) -> int:
    if "_scale_" in name or "_bias_" in name:
        return 0
    return 2 if name.startswith("mix_") else 1


def file_box(tensor: Tensor, slot: Slot, box: Box) -> Box:
    """Where a part of a slot lies in its tensor. In `box` only the first input and first output axis may be cut."""
    outputs = _span(slot.shape[slot.inputs :], box[slot.inputs :], slot.start)
    if not slot.inputs:
        return (outputs,)
    inputs = _span(slot.shape[: slot.inputs], box[: slot.inputs], 0)
    return (outputs, inputs) if tensor.turned else (inputs, outputs)


def _span(shape: Sequence[int], box: Box, start: int) -> slice:
    inner = math.prod(shape[1:])
    return slice(start + box[0].start * inner, start + box[0].stop * inner)


def from_file(tensor: Tensor, slot: Slot, box: Box, array: np.ndarray) -> np.ndarray:
    """What was read at `file_box`, in our layout."""
    array = array.T if slot.inputs and tensor.turned else array
    return array.reshape([part.stop - part.start for part in box])


def to_file(tensor: Tensor, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor of the file from its slots' arrays, each in our layout: the inverse of `from_file`."""
    flat = []
    for slot, array in zip(tensor.slots, arrays, strict=True):
        if slot.inputs:
            array = array.reshape(-1, slot.outputs)
            array = array.T if tensor.turned else array
        flat.append(array.reshape(-1) if not slot.inputs else array)
    axis = 0 if tensor.turned or not tensor.slots[0].inputs else 1
    return np.ascontiguousarray(np.concatenate(flat, axis=axis))


def check_tensors(plan: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], spare: Sequence[str]) -> None:
    """Refuse tensors that are missing, that nobody knows, or that have another shape than the config says."""
    missing = [tensor.name for tensor in plan if tensor.name not in shapes]
    if missing:
        raise UserError(f"tensor {_some(missing)} is missing")
    wrong = [tensor for tensor in plan if tuple(shapes[tensor.name]) != tensor.shape]
    if wrong:
        name = wrong[0].name
        raise UserError(f"tensor {name} has shape {tuple(shapes[name])}, and its config says {wrong[0].shape}")
    known = {tensor.name for tensor in plan}
    extra = [name for name in shapes if name not in known and not any(re.fullmatch(s, name) for s in spare)]
    if extra:
        raise UserError(f"tensor {_some(extra)} has no place in such a model")


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
