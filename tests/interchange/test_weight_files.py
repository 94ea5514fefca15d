"""Folders of weights: what is read, and what is refused, one by one and in one line."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import hf_models
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from epigone.errors import UserError
from epigone.interchange.huggingface import read_config
from epigone.interchange.weight_files import open_weights

NORM = "model.layers.1.input_layernorm.weight"
LAYERS = hf_models.LAYERS


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of tiny models, each written once: name -> folder, in one file or in shards."""
    folders: dict[tuple[str, bool], Path] = {}

    def folder(name: str, shards: bool) -> Path:
        if (name, shards) not in folders:
            folders[name, shards] = tmp_path_factory.mktemp(name)
            more = {"max_shard_size": "20KB"} if shards else {}
            hf_models.write(folders[name, shards], name, torch.bfloat16, **more)
        return folders[name, shards]

    return folder


@pytest.fixture
def model(written, tmp_path):
    """A copy of a tiny model's folder, to be damaged."""

    def copy(name: str = "qwen2", shards: bool = False) -> Path:
        return Path(shutil.copytree(written(name, shards), tmp_path / "model"))

    return copy


def changed(folder: Path, change) -> Path:
    """The folder with its only file of weights changed by a function of the tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def configured(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("shards", [False, True])
def test_every_tensor_and_every_part_of_one(model, shards):
    folder = model(shards=shards)
    files = open_weights(folder)
    expected = {}
    for path in folder.glob("*.safetensors"):
        expected |= load_file(path)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    assert {name: (value.shape, value.dtype) for name, value in expected.items()} == dict(files.tensors)
    for name, value in expected.items():
        assert files.read(name).tobytes() == value.tobytes()
        assert files.read(name).dtype == value.dtype == np.dtype(ml_dtypes.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(files.read(name, (slice(3, 9), slice(1, 4))), expected[name][3:9, 1:4])


def test_the_type_of_the_weights_is_that_of_the_tensors(model):
    folder = configured(model(), dtype="float64")
    assert open_weights(folder).config_json["dtype"] == "bfloat16"
    assert read_config(open_weights(folder).config_json).weights_dtype == "bfloat16"
    mixed = changed(folder, lambda tensors: tensors.update({NORM: tensors[NORM].astype(np.float32)}))
    assert read_config(open_weights(mixed).config_json).weights_dtype == "float32"


def test_no_such_folder(tmp_path):
    assert "is no folder with config.json" in refusal(tmp_path / "nothing")
    assert "is no folder with config.json" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles(model, tmp_path, suffix):
    folder = model()
    (folder / "model.safetensors").rename(folder / f"pytorch_model.{suffix}")
    assert "holds pickles (pytorch_model" in refusal(folder)
    assert "is a pickle" in refusal(folder / f"pytorch_model.{suffix}")


def test_pickles_beside_safetensors_are_not_looked_at(model):
    folder = model()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert NORM in open_weights(folder).tensors


def test_no_weights_and_too_many(model):
    folder = model()
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert NORM in open_weights(folder).tensors
    shutil.copy(folder / "other.safetensors", folder / "another.safetensors")
    assert "2 safetensors files and no index" in refusal(folder)
    (folder / "other.safetensors").unlink()
    (folder / "another.safetensors").unlink()
    assert "holds no safetensors" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard(model, keep):
    folder = model(shards=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard.name}' is truncated" in refusal(folder)


def test_an_absent_shard(model):
    folder = model(shards=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"names {shard.name}, and there is no such file" in refusal(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "model.bin"])
def test_shards_outside_the_folder(model, name):
    folder = model(shards=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: name}}))
    assert "shards are .safetensors files beside it" in refusal(folder)


def test_an_index_that_disagrees_with_its_shards(model):
    folder = model(shards=True)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"model.extra": where[NORM]}}))
    assert "tensor model.extra is missing in" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in where.items() if name != NORM}}))
    assert f"tensor {NORM} is in" in refusal(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    assert "is no index of shards" in refusal(folder)
    index.write_text("{")
    assert "is no JSON file" in refusal(folder)


def test_a_missing_tensor(model):
    assert f"tensor {NORM} is missing" in refusal(changed(model(), lambda tensors: tensors.pop(NORM)))


def test_an_extra_tensor(model):
    extra = {"model.layers.1.self_attn.q_norm.weight": np.ones(8, np.float32)}
    message = refusal(changed(model(), lambda tensors: tensors.update(extra)))
    assert "tensor model.layers.1.self_attn.q_norm.weight has no place" in message


def test_a_wrong_shape(model):
    message = refusal(changed(model(), lambda tensors: tensors.update({NORM: tensors[NORM][:-1]})))
    assert f"tensor {NORM} has shape (23,), and its config says (24,)" in message


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64])
def test_types_that_no_weights_have(model, dtype):
    message = refusal(changed(model(), lambda tensors: tensors.update({NORM: tensors[NORM].astype(dtype)})))
    assert f"tensor {NORM} of" in message
    assert "known are F32, F16, BF16" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": LAYERS + 1},
            f"tensor model.layers.{LAYERS}.self_attn.q_proj.weight (and 8 more) is missing",
        ),
        ({"num_hidden_layers": LAYERS - 1}, "(and 8 more) has no place"),
        ({"hidden_size": 48}, "has shape (131, 24), and its config says (131, 48)"),
        ({"vocab_size": 130}, "has shape (131, 24), and its config says (130, 24)"),
        ({"num_key_value_heads": 1}, "k_proj.weight has shape (30, 24), and its config says (10, 24)"),
        ({"model_type": "qwen3"}, "architectures ['LlamaForCausalLM']"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors(model, values, message):
    assert message in refusal(configured(model("llama2"), **values))


def test_a_config_that_is_no_object(model):
    folder = model()
    (folder / "config.json").write_text("[1]")
    assert "holds no JSON object" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "is no JSON file" in refusal(folder)


def test_a_head_that_equals_the_tied_table_is_dropped(model):
    table = "model.embed_tokens.weight"
    folder = changed(model("smollm2"), lambda tensors: tensors.update({"lm_head.weight": tensors[table].copy()}))
    assert read_config(open_weights(folder).config_json).tied


def test_a_head_that_differs_from_the_tied_table_is_the_head_as_in_transformers(model):
    folder = model("smollm2")
    head = np.random.default_rng(0).normal(size=(131, 24)).astype(ml_dtypes.bfloat16)
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.warns(UserWarning, match=re.escape("lm_head.weight is no copy of the embeddings")):
        files = open_weights(folder)
    assert not read_config(files.config_json).tied
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(theirs, files.read("lm_head.weight").astype(np.float32))


def test_buffers_of_old_files_are_known(model):
    folder = model("llama2")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32) for i in range(LAYERS)}
    assert open_weights(changed(folder, lambda tensors: tensors.update(buffers)))


def test_gpt2_without_its_prefix_and_with_its_masks(model):
    def old(tensors):
        plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        tensors.clear()
        masks = {
            f"h.{i}.attn.{name}bias": np.ones((1, 1, 4, 4), np.float32) for i in range(3) for name in ("", "masked_")
        }
        tensors.update(plain | masks)

    files = open_weights(changed(model("gpt2"), old))
    assert "wte.weight" in files.tensors


def test_the_digest_changes_with_whatever_is_read(model):
    folder = model()
    (folder / "tokenizer.json").write_text("{}")
    seen = [open_weights(folder).digest]
    assert open_weights(folder).digest == seen[0]
    configured(folder, rms_norm_eps=1e-4)
    seen.append(open_weights(folder).digest)
    (folder / "tokenizer.json").write_text("{ }")
    seen.append(open_weights(folder).digest)
    changed(folder, lambda tensors: tensors.update({NORM: tensors[NORM] + np.array(1, ml_dtypes.bfloat16)}))
    seen.append(open_weights(folder).digest)
    (folder / "README.md").write_text("A word more.")
    assert open_weights(folder).digest == seen[-1]
    assert len(set(seen)) == len(seen)


def test_checksums_are_those_of_the_files(model):
    folder = model(shards=True)
    sums = open_weights(folder).checksums()
    assert {"config.json", "generation_config.json"} < set(sums)
    assert all(sums[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums)
    assert {path.name for path in folder.glob("*.safetensors")} < set(sums)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: 'gemma'\nlicense_link: LICENSE\n---\n", "gemma"),
        ("A model.\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_the_licence_of_the_card(model, card, licence):
    folder = model()
    if card is not None:
        (folder / "README.md").write_text(card)
    assert open_weights(folder).licence == licence
