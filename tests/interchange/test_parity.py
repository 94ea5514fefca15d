"""Every family against transformers: the same files give the same logits, the same bits and the same greedy text."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open

from epigone.interchange.huggingface import find_family, read_config
from epigone.interchange.streaming import load_weights, save_weights
from epigone.interchange.weight_files import open_weights
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Specials
from epigone.sampling.decode import DecoderLanguageModel, sample

SPECIALS = Specials(pad=0, bos=1, eos=2, unk=None, never=())
WIDTH = 14
STARTS = (0, 0, 0, 25, 900, 1010)
"""First position of each row of a batch. From 25 a row runs across the original length of the longrope model (32)."""
PADDING = ((0, 0), (4, 0), (0, 3), (2, 1), (0, 0), (5, 0))
"""Padding on the left and on the right of each row."""

logits_of = jax.jit(decoder.apply, static_argnums=0)


@dataclass(frozen=True)
class Pair:
    """A model of transformers, and the same model read from its files."""

    name: str
    folder: Path
    reference: Any
    config: DecoderConfig
    params: Any


def read(folder: Path) -> tuple[DecoderConfig, Any]:
    """A folder as Epigone reads it."""
    files = open_weights(folder)
    config = replace(read_config(files.config_json), specials=SPECIALS)
    return config, load_weights(files, config)


@pytest.fixture(scope="module", params=hf_models.FAMILIES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = hf_models.write(folder, request.param)
    return Pair(request.param, folder, reference, *read(folder))


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random tokens, positions and a mask that is 0 on padding, all [B, T]."""
    tokens_BT = np.random.default_rng(seed).integers(3, hf_models.VOCAB, (len(STARTS), WIDTH))
    positions_BT, mask_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    for b, (start, (left, right)) in enumerate(zip(STARTS, PADDING, strict=True)):
        mask_BT[b, left : WIDTH - right] = 1
        positions_BT[b, left : WIDTH - right] = start + np.arange(WIDTH - left - right)
    return tokens_BT * mask_BT, positions_BT, mask_BT


def reference_logits(model: Any, tokens_BT: np.ndarray, positions_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """What transformers computes for a whole batch."""
    tokens, positions, mask = map(torch.tensor, (tokens_BT, positions_BT, mask_BT))
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()


def assert_same_logits(found_BTV: np.ndarray, expected_BTV: np.ndarray, mask_BT: np.ndarray) -> None:
    found, expected = found_BTV[mask_BT == 1], expected_BTV[mask_BT == 1]
    assert expected.std() > 1.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_logits_of_rows_with_padding_and_long_positions(pair):
    """Transformers reads row by row, since it chooses a longrope's frequencies by the longest row of a batch."""
    rows = batch()
    found = np.asarray(logits_of(pair.config, pair.params, *rows))
    expected = [reference_logits(pair.reference, *(x[b : b + 1] for x in rows)) for b in range(len(STARTS))]
    assert_same_logits(found, np.concatenate(expected), rows[-1])


def test_logits_of_a_padded_batch(pair):
    """Three rows at once: what a user of transformers does."""
    rows = batch()
    expected = reference_logits(pair.reference, *(x[:3] for x in rows))
    assert_same_logits(np.asarray(logits_of(pair.config, pair.params, *rows))[:3], expected, rows[-1][:3])


def test_every_weight_and_every_position_matters(pair):
    """The negative control: a part of a model that was neglected would be seen at the tolerance above."""
    tokens_BT, positions_BT, mask_BT = batch()

    def difference(params: Any, positions_BT: np.ndarray) -> float:
        changed = np.asarray(logits_of(pair.config, params, tokens_BT, positions_BT, mask_BT))
        return float(np.abs(changed - right)[mask_BT == 1].max())

    right = np.asarray(logits_of(pair.config, pair.params, tokens_BT, positions_BT, mask_BT))
    assert difference(pair.params, positions_BT + np.arange(WIDTH) % 2 * (positions_BT < 1000)) > 1e-2
    leaves, tree = jax.tree.flatten_with_path(pair.params)
    draw = np.random.default_rng(0)
    for place, (path, leaf) in enumerate(leaves):
        if "key_bias" in jax.tree_util.keystr(path) and pair.name == "gpt2":
            continue  # without rotation it adds the same to the scores of all keys, and softmax takes it out
        noise = 0.1 * draw.standard_normal(leaf.shape).astype(np.float32)
        changed = [x if i != place else x + noise for i, (_, x) in enumerate(leaves)]
        assert difference(jax.tree.unflatten(tree, changed), positions_BT) > 1e-2, jax.tree_util.keystr(path)


CACHED = ("llama3", "qwen2_yarn_window", "gemma2", "gemma3", "mistral", "gpt2", "olmo2", "phi3_longrope", "qwen3_moe")
"""Every way to keep and read a cache; what the other families add lies outside it."""


@pytest.mark.parametrize("pair", CACHED, indirect=True)
def test_greedy_text_is_that_of_transformers(pair):
    prompts = [np.array(ids, np.int32) for ids in ([7, 99, 130], [50, 4, 17, 3, 88, 61], [12])]
    found = sample(pair.config, pair.params, prompts, seed=0, length=24, top_k=1, slots=4)
    for prompt, (written,) in zip(prompts, found, strict=True):
        assert written.tokens.tolist() == greedy(pair.reference, [SPECIALS.bos, *prompt.tolist()], 24)


@pytest.mark.parametrize("pair", ["llama3", "gpt2"], indirect=True)
def test_a_beam_search_is_that_of_transformers(pair):
    """Of transformers the best of what its search keeps, length normalised; the models are random, so few texts end."""
    prompts = [np.array(ids, np.int32) for ids in ([7, 99, 130], [50, 4, 17, 3, 88, 61], [12], [20, 9])]
    model = DecoderLanguageModel(pair.config, pair.params)
    for beams, length in ((2, 6), (4, 9)):
        ends = {"eos_token_id": SPECIALS.eos, "pad_token_id": SPECIALS.pad, "do_sample": False}
        for prompt, found in zip(prompts, model.beam(prompts, beams=beams, length=length), strict=True):
            ids = torch.tensor([[SPECIALS.bos, *prompt.tolist()]])
            theirs = pair.reference.generate(ids, num_beams=beams, max_new_tokens=length, length_penalty=1.0, **ends)
            assert found.tolist() == [t for t in theirs[0, ids.shape[1] :].tolist() if t > SPECIALS.eos]


def greedy(model: Any, ids: list[int], length: int) -> list[int]:
    """The tokens that transformers' generate adds, eos included."""
    ends = {"eos_token_id": SPECIALS.eos, "pad_token_id": SPECIALS.pad}
    written = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length, **ends)
    return written[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", hf_models.FAMILIES)
def test_bits_of_bfloat16_files_survive_the_way_in_and_out(name, tmp_path):
    hf_models.write(tmp_path / "theirs", name, dtype=torch.bfloat16)
    config, params = read(tmp_path / "theirs")
    save_weights(tmp_path / "ours", config, params, find_family(open_weights(tmp_path / "theirs").config_json))
    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")


def tensors(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Name -> type, shape and bytes of every tensor of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                bits = tensor.contiguous().view(torch.int16).numpy().tobytes()
                found[name] = (tensor.dtype, tuple(tensor.shape), bits)
    return found


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_bfloat16_weights_computed_in_float32(name, tmp_path):
    reference = hf_models.write(tmp_path, name, dtype=torch.bfloat16)
    config, params = read(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    rows = batch(seed=1)
    found = np.asarray(logits_of(replace(config, dtype="float32"), params, *rows))
    assert_same_logits(found, reference_logits(reference, *rows), rows[-1])
