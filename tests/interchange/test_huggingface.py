"""Families of Hugging Face models against transformers' own config classes, read and written."""

import contextlib
import json
from dataclasses import replace

import hf_models
import pytest
import transformers

from epigone.errors import UserError
from epigone.interchange.families import FAMILIES, GPT2, LLAMA, MIXTRAL, PHI3, QWEN3_MOE
from epigone.interchange.huggingface import canonical, find_family, read_config, tensor_plan, write_config
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Specials
from epigone.models.layers import exact_gelu, gelu, layer_norm, learned, offset_rms_norm, silu
from epigone.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 224,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
GPT2_SMALL = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PHI3_128K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
PUBLISHED = {
    "llama 3.1": LLAMA31,
    "smollm2": SMOLLM2,
    "qwen2.5": QWEN25,
    "gemma 2": GEMMA2_2B,
    "gemma 3": GEMMA3_1B,
    "gpt-2": GPT2_SMALL,
    "phi-4-mini": PHI3_128K,
    "qwen3 moe": QWEN3_30B,
    "mixtral": MIXTRAL_8X7B,
}
"""The config.json files of published models, as their owners wrote them (longrope divisors shortened)."""


def whole(config) -> dict:
    """Every value of a config of transformers, defaults too."""
    return json.loads(config.to_json_string(use_diff=False))


def of_transformers(values: dict):
    return transformers.AutoConfig.for_model(**{k: v for k, v in values.items() if k != "architectures"})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_a_file_leaves_out_is_what_transformers_takes(family):
    silent = read_config({"model_type": family.model_type})
    said = read_config(whole(transformers.AutoConfig.for_model(family.model_type)))
    assert silent == said


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_mean_what_transformers_reads_in_them(name):
    values = PUBLISHED[name]
    config = read_config(values)
    through = whole(of_transformers(values)) | {"dtype": values.get("torch_dtype")}
    assert config == read_config(through)


@pytest.mark.parametrize("name", hf_models.FAMILIES)
def test_what_is_written_is_read_back_here_and_by_transformers(name):
    values = whole(hf_models.FAMILIES[name]())
    config, family = read_config(values), find_family(values)
    written = write_config(config, family)
    assert json.loads(json.dumps(written)) == written
    assert read_config(written) == config
    assert read_config(whole(of_transformers(written))) == config
    assert read_config(write_config(config)) == config  # the first family that has it, maybe another one


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_back(name):
    config = read_config(PUBLISHED[name])
    assert read_config(write_config(config, find_family(PUBLISHED[name]))) == config


def test_fields_of_published_models():
    llama = read_config(LLAMA31)
    assert llama.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert llama.specials == Specials(pad=128001, bos=128000, eos=128001, unk=None, stops=(128008, 128009), never=())
    assert (llama.weights_dtype, llama.vocab_multiple, llama.max_length) == ("bfloat16", 1, 131072)
    qwen = read_config(QWEN25)
    assert qwen.rope_scaling == YarnScaling(4.0, 32768)
    assert (qwen.qkv_bias, qwen.mix_bias, qwen.window) == (True, False, None)
    gemma = read_config(GEMMA2_2B)
    assert (gemma.norm, gemma.post_norm, gemma.embedding_scale) == (offset_rms_norm, True, 48.0)
    assert (gemma.window, gemma.window_pattern, gemma.attention_scale) == (4096, (True, False), 224**-0.5)
    third = read_config(GEMMA3_1B)
    assert third.window_pattern == (True, True, True, True, True, False)
    assert (third.rope_theta, third.rope_local_theta, third.rope_scaling) == (1e6, 1e4, LinearScaling(8.0))
    phi = read_config(PHI3_128K)
    assert phi.rope_scaling == LongRopeScaling((1.0,) * 48, (1.5,) * 48, 4096, 32.0)
    assert (phi.rope_fraction, phi.window) == (0.75, 262144)
    experts = read_config(QWEN3_30B)
    assert (experts.experts, experts.experts_per_token, experts.ff_size) == (128, 8, 768)
    gpt = read_config(GPT2_SMALL)
    assert (gpt.norm, gpt.positions, gpt.activation, gpt.ff_size) == (layer_norm, learned, gelu, 3072)


def test_other_names_of_keys():
    long = {"max_position_embeddings": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    short = {"n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3}
    assert read_config({"model_type": "gpt2", **long}) == read_config({"model_type": "gpt2", **short})
    assert {"n_positions", "n_embd", "n_layer", "n_head"} <= set(
        write_config(read_config({"model_type": "gpt2"}), GPT2)
    )
    configs = [read_config({"model_type": "qwen3_moe", key: 17}) for key in ("num_local_experts", "num_experts")]
    assert configs[0] == configs[1]
    assert write_config(configs[0], QWEN3_MOE)["num_experts"] == 17
    assert write_config(read_config({"model_type": "mixtral"}), MIXTRAL)["num_local_experts"] == 8


def test_unscaled_scores_and_inner_sizes_of_gpt2():
    config = read_config({"model_type": "gpt2", "scale_attn_weights": False, "n_inner": 100})
    assert (config.attention_scale, config.ff_size) == (1.0, 100)
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize(("name", "function"), [("silu", silu), ("gelu", exact_gelu), ("gelu_new", gelu)])
def test_activations(name, function):
    assert read_config({"model_type": "llama", "hidden_act": name}).activation is function


REFUSED = {
    "rope type": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "rope key": ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, r"mrope_section=\[1, 2\]"),
    "half a scaling": ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks high_freq_factor, low_freq_factor"),
    "no longrope divisors": ({"rope_scaling": {"type": "longrope"}}, "lacks long_factor, short_factor"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved=True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    "images": ({"vision_config": {"hidden_size": 3}}, "vision_config="),
    "unknown": ({"tie_breaker": 3, "flux": "x"}, "tie_breaker=3; flux='x'"),
    "a window": ({"sliding_window": 128}, "sliding_window=128"),
    "activation": ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
    "text for a number": ({"hidden_size": "4096"}, "hidden_size is '4096'"),
    "a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    "a number for a switch": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    "heads": ({"num_key_value_heads": 5}, "kv_heads 5 does not divide"),
    "classes": ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
    "integers": ({"torch_dtype": "int8"}, "weights_dtype 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(case):
    changed, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        read_config({"model_type": "llama"} | changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "gemma3"}, "did you mean 'gemma3_text'"),
        ({"model_type": "mamba"}, "known are llama"),
        ({}, "unknown architecture None"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "gpt2", "head_dim": 3}, "head_dim=3"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"model_type": "qwen3_moe", "shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ({"model_type": "phi3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "'chunked_attention'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "1 entries, num_hidden_layers is 32"),
        ({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "no sliding_window"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}}, "full_attention and sliding"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}},
            },
            "rope_type 'linear'",
        ),
    ],
)
def test_what_other_families_cannot_represent(values, message):
    with pytest.raises(UserError, match=message):
        read_config(values)


def test_harmless_and_neutral_keys_change_nothing():
    plain = read_config({"model_type": "llama"})
    more = {"attention_dropout": 0.5, "use_cache": False, "pretraining_tp": 8, "id2label": {"0": "A"}, "flux": None}
    assert read_config({"model_type": "llama", "rope_interleaved": False, **more}) == plain


def test_ids_that_no_token_has_are_not_taken():
    config = read_config({"model_type": "llama", "vocab_size": 9, "pad_token_id": -1, "eos_token_id": [2, 50]})
    assert config.specials == Specials(pad=2, bos=1, eos=2, unk=None, never=())


def test_own_decoders_are_families_too():
    assert write_config(DecoderConfig(vocab_size=100))["model_type"] == "llama"
    gpt = DecoderConfig(
        vocab_size=100, norm=layer_norm, norm_bias=True, positions=learned, activation=gelu, gated=False,
        qkv_bias=True, mix_bias=True, ff_bias=True,
    )  # fmt: skip
    assert write_config(gpt)["model_type"] == "gpt2"
    assert write_config(DecoderConfig(vocab_size=100, window=7))["model_type"] == "mistral"
    some = DecoderConfig(vocab_size=100, window=7, window_pattern=(False, True), qk_norm=True)
    assert write_config(some)["layer_types"] == ["full_attention", "sliding_attention"] * 2


def test_a_decoder_of_no_family_is_refused_with_the_fields():
    with pytest.raises(UserError, match=r"'llama' is closest, without attention_softcap=5\.0, embedding_scale=3\.0"):
        write_config(DecoderConfig(vocab_size=100, embedding_scale=3.0, attention_softcap=5.0))
    with pytest.raises(UserError, match="'llama' is closest, without window=3"):
        write_config(DecoderConfig(vocab_size=100, window=3), LLAMA)
    with pytest.raises(UserError, match="vocab_size is open"):
        write_config(DecoderConfig())


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({}, "llama"),
        ({"heads": 5, "kv_heads": 1, "head_size": 10}, "mistral"),
        ({"qk_norm": True, "heads": 5}, "qwen3"),
    ],
)
def test_a_family_whose_class_refuses_the_heads_is_not_taken(change, family):
    """The class of Llama in transformers wants heads that divide the model size, whatever the size of a head."""
    config = replace(DecoderConfig(vocab_size=90, layers=1, model_size=24, heads=3, head_size=8), **change)
    values = write_config(config)
    assert values["model_type"] == family
    transformers.AutoConfig.for_model(**values)


def test_long_factors_are_counted_by_the_class_of_phi3():
    config = read_config(hf_models.phi3_longrope().to_dict())
    with pytest.raises(UserError, match=r"head_size=12 with LongRopeScaling, where model_size / heads is 10"):
        write_config(replace(config, model_size=30, head_size=12), PHI3)


ODD_VALUES = ([], {}, "x", True, -1, 0, 10**30, None, [None])


@pytest.mark.parametrize("name", hf_models.FAMILIES)
def test_a_value_of_any_kind_is_read_or_refused(name):
    """Each key of a config.json in turn, and each of its rotations, with values of every kind."""
    plain = json.loads(hf_models.FAMILIES[name]().to_json_string(use_diff=False))
    nested = [(key, inner) for key, value in plain.items() if isinstance(value, dict) for inner in value]
    refused = 0
    for path in [(key,) for key in plain] + nested:
        for odd in ODD_VALUES:
            values = json.loads(json.dumps(plain))
            (values if len(path) == 1 else values[path[0]])[path[-1]] = odd
            with contextlib.suppress(UserError):
                read_config(values)
                refused -= 1
            refused += 1
    assert refused > 50


def test_a_family_without_a_place_for_a_parameter():
    config = canonical(DecoderConfig(vocab_size=10, layers=1, qk_norm=True, positions=learned))
    with pytest.raises(UserError, match="have no place for position_TD"):
        tensor_plan(config, LLAMA)


def test_the_canonical_form_leaves_nothing_open():
    config = DecoderConfig(vocab_size=10, layers=4, window=3, window_pattern=(True, False, True, False, False))
    filled = canonical(config)
    assert filled.window_pattern == (True, False)
    assert (filled.kv_heads, filled.head_size, filled.ff_size) == (4, 64, 704)
    assert canonical(replace(config, window_pattern=(False,))).window is None
    assert canonical(filled) == filled
    assert canonical(replace(config, attention_scale=64**-0.5)) == filled
