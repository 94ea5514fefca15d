"""Tiny transformers models of every family in a folder: odd sizes, every parameter random, nothing left at its start.

`FAMILIES[name]` is a config of transformers; `write(folder, name)` makes the model, saves it with save_pretrained and
gives it back, in float32 and with plain ("eager") attention, as the reference.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
VOCAB = 131
LAYERS = 2
SPECIALS = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ODD = {**SPECIALS, "hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.3, 1.7],
    "long_factor": [1.5, 4.0, 9.0],
    "original_max_position_embeddings": 32,
}
GEMMA = {**ODD, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 14, "max_position_embeddings": 1024}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
EXPERTS = {**ODD, "head_dim": 10, "max_position_embeddings": 1024, "num_experts_per_tok": 2}


def llama2() -> Any:
    sizes = {**ODD, "num_key_value_heads": 3, "max_position_embeddings": 1024}
    return transformers.LlamaConfig(**sizes, head_dim=10, rms_norm_eps=1e-5)


def llama3() -> Any:
    return transformers.LlamaConfig(**ODD, head_dim=10, max_position_embeddings=1024, rope_parameters=LLAMA3)


def llama_linear() -> Any:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    return transformers.LlamaConfig(**ODD, max_position_embeddings=1024, rope_parameters=rope)


def llama_yarn() -> Any:
    rope = {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2}
    return transformers.LlamaConfig(**ODD, head_dim=10, max_position_embeddings=1024, rope_parameters=rope)


def llama_biased() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    more = {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 1024, "rope_parameters": rope}
    return transformers.LlamaConfig(**ODD, **more)


def smollm2() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e5}
    more = {"rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    return transformers.LlamaConfig(**ODD, **more, rope_parameters=rope)


def qwen2() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return transformers.Qwen2Config(**ODD, max_position_embeddings=1024, rope_parameters=rope)


def qwen2_yarn_window() -> Any:
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    more = {"max_position_embeddings": 1024, "tie_word_embeddings": True}
    return transformers.Qwen2Config(**ODD, **window, **more, rope_parameters=YARN)


def qwen3() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    more = {"head_dim": 10, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    return transformers.Qwen3Config(**ODD, **more, rope_parameters=rope)


def gemma2() -> Any:
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
    return transformers.Gemma2Config(**GEMMA, **caps)


def gemma3() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    sizes = {**GEMMA, "num_hidden_layers": 3}
    return transformers.Gemma3TextConfig(**sizes, layer_types=kinds, rope_parameters=LOCAL_AND_GLOBAL)


def gemma3_plain() -> Any:
    """The pattern from its number alone: every second layer is global, with no scaling."""
    return transformers.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2)


def mistral() -> Any:
    return transformers.MistralConfig(**ODD, head_dim=10, sliding_window=5, max_position_embeddings=1024)


def mistral_global() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    more = {"head_dim": 10, "sliding_window": None, "max_position_embeddings": 1024}
    return transformers.MistralConfig(**ODD, **more, rope_parameters=rope)


def gpt2() -> Any:
    ids = {"bos_token_id": 2, "eos_token_id": 2, "vocab_size": VOCAB}
    return transformers.GPT2Config(**ids, n_positions=1024, n_embd=24, n_layer=LAYERS, n_head=3, n_inner=37)


def olmo2() -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return transformers.Olmo2Config(**ODD, max_position_embeddings=1024, rope_parameters=rope)


def phi3() -> Any:
    """As Phi-3-mini-4k: a window in every layer, no scaling."""
    return transformers.Phi3Config(**ODD, sliding_window=5, max_position_embeddings=1024)


def phi3_longrope() -> Any:
    sizes = {**ODD, "hidden_size": 36}
    lengths = {"max_position_embeddings": 1024, "original_max_position_embeddings": 32}
    return transformers.Phi3Config(**sizes, **lengths, rope_parameters=LONGROPE)


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(**EXPERTS, num_experts=5, moe_intermediate_size=19, norm_topk_prob=True)


def qwen3_moe_raw() -> Any:
    """The weights of the chosen experts as they are, not brought to a sum of one."""
    return transformers.Qwen3MoeConfig(**EXPERTS, num_experts=5, moe_intermediate_size=19, norm_topk_prob=False)


def mixtral() -> Any:
    return transformers.MixtralConfig(**EXPERTS, num_local_experts=5)


FAMILIES: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        llama2, llama3, llama_linear, llama_yarn, llama_biased, smollm2, qwen2, qwen2_yarn_window, qwen3, gemma2,
        gemma3, gemma3_plain, mistral, mistral_global, gpt2, olmo2, phi3, phi3_longrope, qwen3_moe, qwen3_moe_raw,
        mixtral,
    )
}  # fmt: skip


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32, **saving: Any) -> Any:
    """Save a tiny model of a family in a folder, and give it as transformers reads it from there, in float32."""
    config = FAMILIES[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **PLAIN).eval()
    randomise(model, zlib.crc32(name.encode()))
    model.save_pretrained(folder, **saving)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **PLAIN).eval()


def randomise(model: Any, seed: int) -> None:
    """Every parameter random and large enough to matter: norms and biases too, routers so that experts differ."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in name or ".ln_" in name or name.endswith("bias"):
                parameter.add_((0.3 * noise).to(parameter.dtype))
            else:
                parameter.copy_(noise * _spread(name, parameter))


def _spread(name: str, parameter: torch.Tensor) -> float:
    if "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
        return 0.5
    if "router" in name or "mlp.gate.weight" in name:
        return 1.0
    inputs = parameter.shape[-2] if ".c_" in name else parameter.shape[-1]
    return inputs**-0.5
