"""Parts of a config.json and the fields of DecoderConfig that they mean, each read and written by a pair of functions.

A family of models (interchange/families.py) is a tuple of such parts. `read` is given the whole file, with the family's
values where the file is silent; `write` a config in which nothing is left open.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from epigone.errors import UserError
from epigone.interchange import rope
from epigone.interchange.values import (
    activation,
    activation_name,
    layer_count,
    number,
    optional,
    positive,
    switch,
    whole,
)
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Specials
from epigone.models.rope import LongRopeScaling

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Some keys of config.json.

    Attributes:
        keys: those that `read` takes.
        read: the file to fields of DecoderConfig.
        write: a config to keys of the file.
    """

    keys: tuple[str, ...]
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]


def one(key: str, field: str, kind: Callable[[str, Any], Any] = whole) -> Part:
    """One key that is one field."""
    return Part((key,), lambda values: {field: kind(key, values[key])}, lambda config: {key: getattr(config, field)})


def activated(key: str) -> Part:
    """The name of the activation."""
    return Part(
        (key,),
        lambda values: {"activation": activation(key, values[key])},
        lambda config: {key: activation_name(config.activation)},
    )


def biased(key: str, *fields: str) -> Part:
    """One switch for several biases."""
    return Part(
        (key,),
        lambda values: dict.fromkeys(fields, switch(key, values[key])),
        lambda config: {key: getattr(config, fields[0])},
    )


SIZES = (
    one("vocab_size", "vocab_size"),
    one("hidden_size", "model_size"),
    one("num_hidden_layers", "layers", layer_count),
    one("num_attention_heads", "heads"),
    one("max_position_embeddings", "max_length"),
    one("tie_word_embeddings", "tied", switch),
)
GROUPED = (one("num_key_value_heads", "kv_heads", optional(whole)), one("head_dim", "head_size", optional(whole)))
FEED_FORWARD = one("intermediate_size", "ff_size")
RMS = one("rms_norm_eps", "norm_epsilon", number)
ATTENTION_BIAS = biased("attention_bias", "qkv_bias", "mix_bias")
MLP_BIAS = biased("mlp_bias", "ff_bias")

_ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
ROPE = Part(_ROPE_KEYS, rope.read_rope, rope.write_rope)
PHI3_ROPE = Part(_ROPE_KEYS, rope.read_phi3_rope, rope.write_phi3_rope)
TWO_ROPES = Part((*_ROPE_KEYS, "rope_local_base_freq"), rope.read_two_ropes, rope.write_two_ropes)


def _read_root(values: Values) -> dict[str, Any]:
    return {"embedding_scale": whole("hidden_size", values["hidden_size"]) ** 0.5}


GEMMA_SCALE = Part(("hidden_size",), _read_root, lambda _: {})
"""The embeddings are multiplied by the square root of their size."""
SOFTCAPS = (
    one("attn_logit_softcapping", "attention_softcap", optional(number)),
    one("final_logit_softcapping", "logit_softcap", optional(number)),
)
EXPERTS = (one("num_local_experts", "experts"), one("num_experts_per_tok", "experts_per_token"))


def _read_query_scale(values: Values) -> dict[str, Any]:
    return {"attention_scale": positive("query_pre_attn_scalar", values["query_pre_attn_scalar"]) ** -0.5}


def _write_query_scale(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.score_scale**-2
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar}


QUERY_SCALE = Part(("query_pre_attn_scalar",), _read_query_scale, _write_query_scale)


def _read_gpt2_scale(values: Values) -> dict[str, Any]:
    return {} if switch("scale_attn_weights", values["scale_attn_weights"]) else {"attention_scale": 1.0}


GPT2_SCALE = Part(
    ("scale_attn_weights",), _read_gpt2_scale, lambda config: {"scale_attn_weights": config.attention_scale is None}
)


def _read_inner(values: Values) -> dict[str, Any]:
    inner = optional(whole)("n_inner", values["n_inner"])
    return {"ff_size": 4 * whole("hidden_size", values["hidden_size"]) if inner is None else inner}


GPT2_INNER = Part(("n_inner",), _read_inner, lambda config: {"n_inner": config.ff_size})


def _read_window(values: Values) -> dict[str, Any]:
    return {"window": optional(whole)("sliding_window", values["sliding_window"])}


def _write_window(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.window}


WINDOW = Part(("sliding_window",), _read_window, _write_window)
"""One window for all layers, or null."""


def _read_switched_window(values: Values) -> dict[str, Any]:
    on = switch("use_sliding_window", values["use_sliding_window"])
    return _read_window(values) if on else {"window": None}


def _write_switched_window(config: DecoderConfig) -> dict[str, Any]:
    return {"use_sliding_window": config.window is not None, **_write_window(config)}


SWITCHED_WINDOW = Part(("use_sliding_window", "sliding_window"), _read_switched_window, _write_switched_window)
"""The same behind a switch (Qwen3-MoE)."""


def _layer_types(values: Values, otherwise: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers are bound: as layer_types says, or else by a layer's number."""
    layers = layer_count("num_hidden_layers", values["num_hidden_layers"])
    types = values.get("layer_types")
    if types is None:
        return tuple(otherwise(layer) for layer in range(layers))
    if not isinstance(types, list):
        raise UserError(f"layer_types is {types!r:.80}: a list is wanted")
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise UserError(f"layer_types has {unknown[0]!r}: only full_attention and sliding_attention are known")
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries, num_hidden_layers is {layers}")
    return tuple(kind == "sliding_attention" for kind in types)


def _patterned(values: Values, window: int | None, pattern: tuple[bool, ...]) -> dict[str, Any]:
    if window is None and values.get("layer_types") and any(pattern):
        raise UserError("layer_types has sliding_attention, and there is no sliding_window")
    return {"window": window, "window_pattern": pattern}


def _read_late_windows(values: Values) -> dict[str, Any]:
    window = _read_switched_window(values)["window"]
    first = whole("max_window_layers", values["max_window_layers"])
    return _patterned(values, window, _layer_types(values, lambda layer: layer >= first))


def _write_layer_types(config: DecoderConfig) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    return {"layer_types": [kinds[bound] for bound in config.windowed_layers]}


def _write_late_windows(config: DecoderConfig) -> dict[str, Any]:
    if config.window is None:
        return {"use_sliding_window": False}
    first = config.windowed_layers.index(True)
    return {**_write_switched_window(config), "max_window_layers": first, **_write_layer_types(config)}


LATE_WINDOWS = Part(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    _read_late_windows,
    _write_late_windows,
)
"""A window for layers from one on, or for those that layer_types names (Qwen 2 and 3)."""


def _read_alternating(values: Values) -> dict[str, Any]:
    return _patterned(values, _read_window(values)["window"], _layer_types(values, lambda layer: layer % 2 == 0))


def _write_alternating(config: DecoderConfig) -> dict[str, Any]:
    return {**(_write_window(config) if config.window else {}), **_write_layer_types(config)}


ALTERNATING = Part(("sliding_window", "layer_types"), _read_alternating, _write_alternating)
"""A window for every other layer, the first among them (Gemma 2)."""


def _read_all_but_every(values: Values) -> dict[str, Any]:
    every = whole("sliding_window_pattern", values["sliding_window_pattern"])
    bound = _layer_types(values, lambda layer: (layer + 1) % every != 0)
    return _patterned(values, _read_window(values)["window"], bound)


ALL_BUT_EVERY = Part(
    ("sliding_window", "sliding_window_pattern", "layer_types"), _read_all_but_every, _write_alternating
)
"""A window for all layers but every sixth (Gemma 3)."""


def _read_specials(values: Values) -> dict[str, Any]:
    """A start: the tokenizer knows more. Ids outside the vocabulary stand for none."""
    size = whole("vocab_size", values["vocab_size"])
    ends = values.get("eos_token_id")
    ids = [values.get("bos_token_id"), values.get("pad_token_id"), *(ends if isinstance(ends, list) else [ends])]
    bos, pad, eos, *stops = [i if isinstance(i, int) and 0 <= i < size else None for i in ids] + [None] * (3 - len(ids))
    known = [i for i in (eos, bos, pad) if i is not None]
    eos = known[0] if known else 0
    further = tuple(i for i in stops if i is not None)
    given = {"pad": eos if pad is None else pad, "bos": eos if bos is None else bos, "eos": eos}
    return {"specials": Specials(**given, unk=None, stops=further, never=())}


def _write_specials(config: DecoderConfig) -> dict[str, Any]:
    specials = config.specials
    ends = [specials.eos, *specials.stops] if specials.stops else specials.eos
    return {"bos_token_id": specials.bos, "eos_token_id": ends, "pad_token_id": specials.pad}


SPECIALS = Part(("bos_token_id", "eos_token_id", "pad_token_id"), _read_specials, _write_specials)


def _read_dtype(values: Values) -> dict[str, Any]:
    return {"weights_dtype": values.get("dtype") or values.get("torch_dtype") or "float32"}


DTYPE = Part(("dtype", "torch_dtype"), _read_dtype, lambda config: {"torch_dtype": config.weights_dtype})


def heads_that_do_not_divide(config: DecoderConfig) -> str:
    """Some classes of transformers refuse heads that do not divide the model size, whatever the size of a head is."""
    s = config.sizes
    return f"model_size={s.D}, which heads={s.N} do not divide" if s.D % s.N else ""


def long_factors_of_other_heads(config: DecoderConfig) -> str:
    """Phi-3's class counts the factors of its longrope by model_size / heads."""
    s = config.sizes
    odd = isinstance(config.rope_scaling, LongRopeScaling) and s.H != s.D // s.N
    return f"head_size={s.H} with LongRopeScaling, where model_size / heads is {s.D / s.N:g}" if odd else ""
