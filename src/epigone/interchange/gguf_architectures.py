"""GGUF's names of architectures, metadata and tensors, and what they are in Hugging Face files."""

from collections.abc import Mapping
from dataclasses import dataclass

from epigone.interchange.families import GEMMA2, GEMMA3, LLAMA, QWEN2, QWEN3, Family


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
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ARCHITECTURES = (
    Architecture("llama", LLAMA, _MODULES, turned=True),
    Architecture("qwen2", QWEN2, _MODULES),
    Architecture("qwen3", QWEN3, _MODULES),
    Architecture("gemma2", GEMMA2, _GEMMA_MODULES, raised=True, large=46),
    Architecture("gemma3", GEMMA3, _GEMMA_MODULES, raised=True, large=62, needed=("attention.sliding_window",)),
)

KEYS = {
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
NEEDED = (
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
CHECKED = (
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
)
IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
FREQUENCIES = "rope_freqs.weight"
