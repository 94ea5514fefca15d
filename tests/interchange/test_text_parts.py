"""Language models inside models that also see, against transformers given text alone."""

import json
from dataclasses import replace

import hf_models
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from epigone.errors import UserError
from epigone.interchange.huggingface import read_config
from epigone.interchange.streaming import load_weights
from epigone.interchange.weight_files import open_weights
from epigone.models import decoder

EYES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}


def gemma3():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text = {**hf_models.GEMMA, "num_hidden_layers": 3, "layer_types": kinds}
    config = transformers.Gemma3Config(
        text_config={**text, "rope_parameters": hf_models.LOCAL_AND_GLOBAL},
        vision_config=EYES,
        mm_tokens_per_image=1,
        image_token_index=7,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral3():
    text = {**hf_models.ODD, "model_type": "mistral", "head_dim": 10, "sliding_window": None}
    eyes = {**EYES, "model_type": "pixtral"}
    config = transformers.Mistral3Config(text_config=text, vision_config=eyes, tie_word_embeddings=False)
    return transformers.Mistral3ForConditionalGeneration(config)


@pytest.fixture(params=[gemma3, mistral3], ids=lambda make: make.__name__)
def both(request, tmp_path):
    """The folder of a whole model, and the model."""
    model = request.param().eval()
    hf_models.randomise(model, 0)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_language_model_gives_the_logits_of_the_whole_model(both):
    folder, model = both
    files = open_weights(folder)
    config = replace(read_config(files.config_json), vocab_multiple=1)
    tokens_BT = np.random.default_rng(0).integers(8, hf_models.VOCAB, (2, 12))
    places_BT = np.broadcast_to(np.arange(12), (2, 12))
    found = jax.jit(decoder.apply, static_argnums=0)(
        config, load_weights(files, config), tokens_BT, places_BT, np.ones_like(tokens_BT)
    )
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens_BT)).logits.numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_no_tensor_of_images_is_read_and_no_other_tensor_is_overlooked(both):
    folder, _ = both
    files = open_weights(folder)
    whole = load_file(folder / "model.safetensors")
    assert len(files.tensors) == sum(name.startswith("language_model.") for name in whole) < len(whole)
    for name in files.tensors:
        np.testing.assert_array_equal(files.read(name), whole[f"language_model.{name}"])
    save_file(whole | {"audio_tower.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"audio_tower\.weight"):
        open_weights(folder)


def test_a_text_config_of_another_family_is_refused(both):
    folder, _ = both
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for inner in ({"model_type": "qwen2"}, None, "text"):
        path.write_text(json.dumps(values | {"text_config": inner}))
        with pytest.raises(UserError, match="text_config="):
            open_weights(folder)


def test_ids_of_the_whole_model_count(both):
    folder, _ = both
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [4, 9]}))
    specials = read_config(open_weights(folder).config_json).specials
    assert (specials.eos, specials.stops) == (4, (9,))
