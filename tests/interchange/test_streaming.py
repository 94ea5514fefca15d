"""Weights between files and the mesh: bit for bit, wherever they lie, and with little of the host's memory."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import hf_models
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from epigone.errors import Fault, UserError
from epigone.interchange import streaming
from epigone.interchange.huggingface import find_family, read_config
from epigone.interchange.streaming import load_weights, save_weights
from epigone.interchange.weight_files import open_weights
from epigone.models.config import DecoderConfig
from epigone.models.decoder import init
from epigone.models.sharding import Sharding, make_mesh

EVEN = DecoderConfig(
    vocab_size=90, layers=3, model_size=32, heads=4, kv_heads=2, head_size=6, ff_size=48, vocab_multiple=8, tied=False
)
EXPERTS = replace(EVEN, experts=4, ff_size=16, qk_norm=True)


def everything(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.shape == other[name].shape, name
        assert array.dtype == other[name].dtype, name
        assert array.tobytes() == other[name].tobytes(), name


def equal_trees(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("name", hf_models.FAMILIES)
def test_what_was_read_is_written_bit_for_bit(name, tmp_path):
    hf_models.write(tmp_path / "theirs", name, torch.bfloat16)
    files = open_weights(tmp_path / "theirs")
    config = read_config(files.config_json)
    assert config.weights_dtype == "bfloat16"
    save_weights(tmp_path / "ours", config, load_weights(files, config), find_family(files.config_json), 20_000)
    assert_same_bits(everything(tmp_path / "ours"), everything(tmp_path / "theirs"))
    again = open_weights(tmp_path / "ours")
    assert read_config(again.config_json) == config


def test_where_the_numbers_lie(tmp_path):
    model = hf_models.write(tmp_path, "llama3")
    theirs = {name: array.numpy() for name, array in model.state_dict().items()}
    files = open_weights(tmp_path)
    params = load_weights(files, read_config(files.config_json))
    ours = {name: np.asarray(value[...]) for name, value in params["layers"].items()}
    for layer in range(hf_models.LAYERS):
        place = f"model.layers.{layer}."
        query = theirs[f"{place}self_attn.q_proj.weight"]
        for head in range(3):
            np.testing.assert_array_equal(ours["query_LDNH"][layer, :, head], query[10 * head : 10 * head + 10].T)
        mix = theirs[f"{place}self_attn.o_proj.weight"]
        np.testing.assert_array_equal(ours["mix_LNHD"][layer, 1, 4], mix[:, 14])
        np.testing.assert_array_equal(ours["down_LFD"][layer], theirs[f"{place}mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(
            ours["ff_norm_scale_LD"][layer], theirs[f"{place}post_attention_layernorm.weight"]
        )
    np.testing.assert_array_equal(np.asarray(params["outer"]["head_VD"][...]), theirs["lm_head.weight"])


@pytest.mark.parametrize("config", [EVEN, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("sizes", "block"), [((1, 1, 1), 500), ((2, 2, 2), 1 << 20), ((2, 2, 2), 300), ((1, 4, 1), 900)]
)
def test_any_mesh_and_any_block_give_the_same_parameters(config, sizes, block, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", block)
    params = init(config, 0)
    save_weights(tmp_path, config, params)
    plain = load_weights(open_weights(tmp_path), replace(config, vocab_multiple=1))
    whole = replace(config, vocab_multiple=90)
    assert equal_trees(plain, jax.tree.map(lambda leaf: leaf[:90] if leaf.shape == (96, 32) else leaf, params))
    with jax.set_mesh(make_mesh(*sizes)):
        cut = load_weights(open_weights(tmp_path), replace(whole, vocab_multiple=2))
        assert equal_trees(cut, plain)
        assert cut["layers"]["up_" + ("LEDF" if config.experts else "LDF")][...].sharding.spec[-1] == "tensor"
        save_weights(tmp_path / "again", whole, cut)
    assert_same_bits(everything(tmp_path / "again"), everything(tmp_path))


def test_padded_rows_are_zero_and_are_not_written(tmp_path):
    params = init(EVEN, 0)
    save_weights(tmp_path, EVEN, params)
    assert everything(tmp_path)["model.embed_tokens.weight"].shape == (90, 32)
    loaded = load_weights(open_weights(tmp_path), EVEN)
    table, before = (np.asarray(tree["outer"]["embedding_VD"][...]) for tree in (loaded, params))
    assert table.shape == (96, 32)
    np.testing.assert_array_equal(table[:90], before[:90])
    assert not table[90:].any()


def test_another_type_on_either_way(tmp_path):
    params = init(EVEN, 0)
    save_weights(tmp_path, replace(EVEN, weights_dtype="bfloat16"), params)
    files = open_weights(tmp_path)
    assert {kind.name for _, kind in files.tensors.values()} == {"bfloat16"}
    loaded = load_weights(files, replace(EVEN, weights_dtype="float32"))
    gate, rounded = loaded["layers"]["gate_LDF"][...], params["layers"]["gate_LDF"][...].astype("bfloat16")
    assert gate.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(gate), np.asarray(rounded.astype("float32")))


def test_transformers_loads_what_is_written(tmp_path):
    params = init(EVEN, 0)
    names = save_weights(tmp_path, EVEN, params, shard_bytes=20_000)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    theirs = {name: array.numpy() for name, array in model.state_dict().items()}
    assert_same_bits(everything(tmp_path), theirs)
    assert model.config.model_type == "llama"


def test_no_shard_is_larger_than_asked_for(tmp_path):
    params = init(EVEN, 0)
    names = save_weights(tmp_path, EVEN, params, shard_bytes=20_000)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(sum(array.nbytes for array in load_file(tmp_path / name).values()) <= 20_000 for name in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in everything(tmp_path).values())
    save_weights(tmp_path / "single", EVEN, params)
    assert sorted(path.name for path in (tmp_path / "single").iterdir()) == ["config.json", "model.safetensors"]
    save_weights(tmp_path / "each", EVEN, params, shard_bytes=1)  # a tensor that is larger has a file of its own
    assert_same_bits(everything(tmp_path / "each"), everything(tmp_path))


def test_weights_are_not_written_over_others(tmp_path):
    params = init(EVEN, 0)
    save_weights(tmp_path, EVEN, params)
    with pytest.raises(UserError, match="holds weights already"):
        save_weights(tmp_path, EVEN, params)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fault, match="No space left on device"):
        save_weights(tmp_path, EVEN, init(EVEN, 0))
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_cannot_cut_the_parameters(tmp_path):
    save_weights(tmp_path, EVEN, init(EVEN, 0))
    with jax.set_mesh(make_mesh(1, 1, 4)), pytest.raises(UserError, match="K has size 2"):
        load_weights(open_weights(tmp_path), EVEN)
    with jax.set_mesh(make_mesh(1, 1, 4)):
        loaded = load_weights(open_weights(tmp_path), EVEN, Sharding(K=()))
    assert loaded["layers"]["key_LDKH"][...].shape == (3, 32, 2, 6)


LARGE = replace(EVEN, vocab_size=2048, layers=18, model_size=512, heads=8, kv_heads=8, head_size=64, ff_size=1536)
CHILD = """
import ctypes, sys, jax
from pathlib import Path
from safetensors.numpy import load_file
from epigone.interchange.huggingface import read_config
from epigone.models.sharding import make_mesh
from epigone.interchange.streaming import load_weights
from epigone.interchange.weight_files import open_weights

def memory(what):
    return 1024 * int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])

def streamed():
    files = open_weights(folder)
    return load_weights(files, read_config(files.config_json))

def at_once():
    arrays = {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}
    return [jax.device_put(array.copy(), jax.devices()[0]) for array in arrays.values()]

folder, load = Path(sys.argv[2]), {"streamed": streamed, "at once": at_once}[sys.argv[1]]
with jax.set_mesh(make_mesh(1, 2, 2)):
    jax.block_until_ready(load())  # what is compiled stays, whatever the size of the arrays
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory("VmRSS")
    params = jax.block_until_ready(load())
    placed = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(memory("VmHWM") - before, placed)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of 260 MB in seven shards."""
    folder = tmp_path_factory.mktemp("large")
    save_weights(folder, LARGE, init(LARGE, 0), shard_bytes=40 << 20)
    return folder


def measured(way: str, folder) -> tuple[int, int]:
    """How far the memory of a process rose while it loaded weights, and the size of the placed arrays."""
    command = [sys.executable, "-c", CHILD, way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rise, placed = map(int, done.stdout.split())
    return rise, placed


def test_the_host_holds_no_more_than_the_largest_shard(large):
    shards = [path.stat().st_size for path in large.glob("*.safetensors")]
    assert len(shards) == 7
    rise, placed = measured("streamed", large)
    assert 6 * max(shards) < sum(shards) < placed < 1.01 * sum(shards)  # small parameters lie on several devices
    assert placed < rise < placed + 1.1 * max(shards)


def test_loading_all_at_once_holds_more(large):
    shards = [path.stat().st_size for path in large.glob("*.safetensors")]
    rise, placed = measured("at once", large)
    assert rise > placed + 1.1 * max(shards)
