"""The table of Hugging Face families: what each class of transformers takes where a file is silent, what its files
mean, what all its models share, and the names of its modules. Values are those of transformers 4 and 5.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from epigone.interchange import fields as parts
from epigone.interchange import tensors as modules
from epigone.interchange.fields import Part, one
from epigone.interchange.tensors import Module
from epigone.interchange.values import number, switch
from epigone.models.config import DecoderConfig
from epigone.models.layers import layer_norm, learned, offset_rms_norm, rms_norm, rotary

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        model_type: its name in config.json.
        architecture: the class of transformers that has an output head.
        defaults: values of keys that a file may leave out.
        parts: what is read and written.
        fixed: fields of DecoderConfig that all its models share.
        inner: modules of a layer.
        outer: modules outside the layers.
        prefix: what the names of all modules but the head begin with; a file of the bare model has none.
        layers: path of the layers behind the prefix.
        ignored: keys that its class does not read, or reads for something else than the model.
        names: names in files of keys that have others here; either is read, the file's is written.
        spare: patterns of tensors that files have and nobody needs.
        refused: what its class of transformers refuses in a decoder that its files could describe; "" for nothing.
    """

    model_type: str
    architecture: str
    defaults: Values
    parts: tuple[Part, ...]
    fixed: Values
    inner: tuple[Module, ...]
    outer: tuple[Module, ...] = modules.OUTER
    prefix: str = "model."
    layers: str = "layers."
    ignored: tuple[str, ...] = ()
    names: Values = field(default_factory=dict)
    spare: tuple[str, ...] = modules.INVERSE_FREQUENCIES
    refused: Callable[[DecoderConfig], str] = lambda config: ""


def _sizes(
    vocabulary: int, model: int, ff: int, layers: int, heads: int, kv_heads: int | None, length: int
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": model,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def _ids(bos: int | None, eos: int | None, pad: int | None) -> dict[str, Any]:
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


_COMMON = (*parts.SIZES, parts.SPECIALS, parts.DTYPE)
_MODERN = (*_COMMON, *parts.GROUPED, parts.RMS)
_DENSE = (*_MODERN, parts.activated("hidden_act"), parts.FEED_FORWARD)
_PLAIN = {"norm": rms_norm, "positions": rotary, "gated": True}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    defaults=_sizes(32000, 4096, 11008, 32, 32, None, 2048) | _ids(1, 2, None) | {"mlp_bias": False},
    parts=(*_DENSE, parts.ROPE, parts.ATTENTION_BIAS, parts.MLP_BIAS),
    fixed=_PLAIN,
    inner=modules.LLAMA,
    refused=parts.heads_that_do_not_divide,
)

_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults=_sizes(151936, 4096, 22016, 32, 32, 32, 32768) | _QWEN_WINDOW,
    parts=(*_DENSE, parts.ROPE, parts.LATE_WINDOWS),
    fixed=_PLAIN | {"qkv_bias": True},
    inner=modules.LLAMA,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    parts=(*_DENSE, parts.ROPE, parts.LATE_WINDOWS, parts.ATTENTION_BIAS),
    fixed=_PLAIN | {"qk_norm": True},
    inner=modules.LLAMA,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    defaults=_sizes(151936, 2048, 6144, 24, 32, 4, 32768)
    | _QWEN_WINDOW
    | {"moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_local_experts": 128, "norm_topk_prob": False},
    parts=(
        *_MODERN,
        parts.activated("hidden_act"),
        one("moe_intermediate_size", "ff_size"),
        parts.ROPE,
        parts.SWITCHED_WINDOW,
        parts.ATTENTION_BIAS,
        *parts.EXPERTS,
        one("norm_topk_prob", "normalise_experts", switch),
    ),
    fixed=_PLAIN | {"qk_norm": True},
    inner=modules.QWEN3_MOE,
    ignored=("intermediate_size", "max_window_layers"),
    names={"num_local_experts": "num_experts"},
)

_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_PARTS = (
    *_MODERN,
    parts.activated("hidden_activation"),
    parts.FEED_FORWARD,
    parts.ATTENTION_BIAS,
    parts.QUERY_SCALE,
    parts.GEMMA_SCALE,
    *parts.SOFTCAPS,
)
_GEMMA_FIXED = _PLAIN | {"norm": offset_rms_norm, "pre_norm": True, "post_norm": True}
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    defaults=_sizes(256000, 2304, 9216, 26, 8, 4, 8192)
    | _ids(2, 1, 0)
    | _GEMMA
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    parts=(*_GEMMA_PARTS, parts.ROPE, parts.ALTERNATING),
    fixed=_GEMMA_FIXED,
    inner=modules.GEMMA,
    ignored=("hidden_act", "sliding_window_size"),
    refused=parts.heads_that_do_not_divide,
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    defaults=_sizes(262208, 2304, 9216, 26, 8, 4, 131072)
    | _ids(2, 1, 0)
    | _GEMMA
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    parts=(*_GEMMA_PARTS, parts.TWO_ROPES, parts.ALL_BUT_EVERY),
    fixed=_GEMMA_FIXED | {"qk_norm": True},
    inner=modules.GEMMA,
    ignored=("hidden_act", "_sliding_window_pattern"),
    refused=parts.heads_that_do_not_divide,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    defaults=_sizes(32000, 4096, 14336, 32, 32, 8, 131072) | _ids(1, 2, None) | {"sliding_window": 4096},
    parts=(*_DENSE, parts.ROPE, parts.WINDOW),
    fixed=_PLAIN,
    inner=modules.LLAMA,
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    defaults={**MISTRAL.defaults}
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
    | {"num_experts_per_tok": 2, "num_local_experts": 8},
    parts=(*MISTRAL.parts, *parts.EXPERTS),
    fixed=_PLAIN | {"normalise_experts": True},
    inner=modules.MIXTRAL,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    defaults=_sizes(50304, 4096, 11008, 32, 32, None, 2048) | _ids(None, 50279, 1) | {"rms_norm_eps": 1e-5},
    parts=(*_DENSE, parts.ROPE, parts.ATTENTION_BIAS),
    fixed=_PLAIN | {"pre_norm": False, "post_norm": True, "qk_norm_whole": True},
    inner=modules.OLMO2,
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    defaults=_sizes(32064, 3072, 8192, 32, 32, None, 4096)
    | _ids(1, 32000, 32000)
    | {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
    parts=(*_DENSE, parts.PHI3_ROPE, parts.WINDOW),
    fixed=_PLAIN,
    inner=modules.PHI3,
    refused=parts.long_factors_of_other_heads,
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    defaults=_sizes(50257, 768, 3072, 12, 12, None, 1024)
    | _ids(50256, 50256, None)
    | {"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    | {"n_inner": None, "scale_attn_weights": True},
    parts=(
        *_COMMON,
        parts.activated("activation_function"),
        one("layer_norm_epsilon", "norm_epsilon", number),
        parts.GPT2_INNER,
        parts.GPT2_SCALE,
    ),
    fixed={"norm": layer_norm, "norm_bias": True, "positions": learned, "gated": False}
    | dict.fromkeys(("qkv_bias", "mix_bias", "ff_bias"), True),
    inner=modules.GPT2,
    outer=modules.GPT2_OUTER,
    prefix="transformer.",
    layers="h.",
    names={
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    spare=modules.GPT2_BUFFERS,
)

FAMILIES = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, MISTRAL, GPT2, OLMO2, PHI3, QWEN3_MOE, MIXTRAL)
"""In the order in which they are tried when a config is written."""
