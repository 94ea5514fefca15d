import json
from dataclasses import replace

import numpy as np
import pytest
from data import tokenizer_folders as folders
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.data.tokenizers import BPE, SPECIALS, Bytes, Words
from epigone.errors import Fault, UserError
from epigone.models.language_model import Specials

OWN = {
    "bytes": Bytes().build(),
    "bpe": BPE(300).build(folders.TEXT),
    "words": Words().build([*folders.TEXT, "\" ' - ( ) [ ] { } / $ # % … ” a_b x'y « €"]),
}
TEXTS = [
    *folders.TEXT[:4],
    "",
    'and "the cat" (sat), "on" "mat". a - b "',
    "⟨eos⟩ ⟨unk⟩⟨bos⟩ </s>",
    "  naïve 世界 🙂\n\n",
]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    for name, tokenizer in OWN.items():
        tokenizer.export(place / name)
    return {name: (tokenizer, AutoTokenizer.from_pretrained(place / name)) for name, tokenizer in OWN.items()}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("text", TEXTS)
def test_own_tokenizers_have_the_same_ids_and_text_in_transformers(own, name, text):
    ours, theirs = own[name]
    ids = ours.encode(text)
    assert theirs(text).input_ids == [1, *ids]
    assert theirs(text, add_special_tokens=False).input_ids == ids.tolist()
    known = [index for index in ids if index > 3]
    assert theirs.decode([1, *known, 2, 0], skip_special_tokens=True) == ours.decode(known)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_has_the_same_ids_in_transformers(own, text):
    for ours, theirs in own.values():
        assert theirs(text).input_ids == [1, *ours.encode(text)]


@settings(max_examples=200, deadline=None)
@given(picks=st.lists(st.integers(4, 10**6), max_size=30))
def test_any_words_are_printed_the_same_by_transformers(own, picks):
    ours, theirs = own["words"]
    ids = [4 + pick % (ours.size - 4) for pick in picks]
    assert theirs.decode(ids) == ours.decode(ids)


def test_own_special_tokens_are_named(own):
    for _, theirs in own.values():
        names = (theirs.pad_token, theirs.bos_token, theirs.eos_token, theirs.unk_token)
        assert names == SPECIALS
        assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)


@pytest.mark.parametrize("name", OWN)
def test_own_tokenizers_come_back(tmp_path, name):
    OWN[name].export(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [0, 1]}))
    back = pretrained_tokenizer(tmp_path, OWN[name].size).build()
    assert back.specials == OWN[name].specials == Specials()
    for text in TEXTS:
        ids = OWN[name].encode(text)
        np.testing.assert_array_equal(back.encode(text), ids)
        known = [index for index in ids if index != 3]
        assert back.decode(known) == OWN[name].decode(known)


def test_own_tokenizers_have_no_chat():
    assert OWN["bpe"].chat_template is None
    with pytest.raises(UserError, match="has no chat template"):
        OWN["bpe"].render_chat([{"role": "user", "content": "Hi"}])


MODEL_TYPES = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "olmo2", "phi3", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("kind", folders.KINDS, ids=lambda kind: kind.__name__)
def test_published_tokenizers_go_through_unchanged(tmp_path, kind):
    folder = folders.write(tmp_path / "from", kind, chat_template=folders.TEMPLATE)
    ours = pretrained_tokenizer(folder, 500).build()
    ours.export(tmp_path / "to")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("from", "to"))
    for text in [*TEXTS, "a<s>b </s><|user|> <|endoftext|>"]:
        ids = ours.encode(text, specials=True)
        assert after(text).input_ids == before(text).input_ids
        assert after(text, add_special_tokens=False).input_ids == ids.tolist()
        assert after.decode(ids) == ours.decode(ids, specials=True)
    assert after.special_tokens_map == before.special_tokens_map == ours.conventions.names
    assert after.chat_template == ours.chat_template == folders.TEMPLATE


@pytest.mark.parametrize("kind", [folders.llama3, folders.llama2], ids=lambda kind: kind.__name__)
def test_the_model_beside_it_does_not_change_what_transformers_makes_of_it(tmp_path, kind):
    ours = pretrained_tokenizer(folders.write(tmp_path / "from", kind), 500).build()
    ours.export(tmp_path)
    text = "  Hello 12345 wor</s>ld 世界\n\n<|user|>x  y"
    for model_type in MODEL_TYPES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, specials=True).tolist()


@pytest.mark.parametrize("kind", folders.KINDS, ids=lambda kind: kind.__name__)
def test_published_tokenizers_come_back(tmp_path, kind):
    folder = folders.write(tmp_path / "from", kind, chat_template=folders.TEMPLATE, model_max_length=77)
    ours = pretrained_tokenizer(folder, 500).build()
    ours.export(tmp_path / "to")
    back = pretrained_tokenizer(tmp_path / "to", 500).build()
    assert back.identity == ours.identity
    assert back.conventions == ours.conventions
    assert back.conventions.settings == {"model_max_length": 77}


def test_ends_of_the_generation_config_and_another_bos_come_back(tmp_path):
    folder = folders.write(tmp_path / "from", folders.llama3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [342, 341]}))
    ours = pretrained_tokenizer(folder, 500, bos="<|end_of_text|>").build()
    ours.export(tmp_path / "to")
    (tmp_path / "to" / "generation_config.json").write_text(json.dumps({"eos_token_id": [342, 341]}))
    back = pretrained_tokenizer(tmp_path / "to", 500).build()
    assert back.specials == ours.specials == Specials(342, 341, 342, None, (341,), ())


@pytest.mark.parametrize("way", ["config", "named", "file"])
def test_chats_are_rendered_as_in_transformers(tmp_path, way):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": folders.TEMPLATE}]
    given = {"config": folders.TEMPLATE, "named": named, "file": "not this one"}[way]
    folder = folders.write(tmp_path, folders.llama3, chat_template=given)
    if way == "file":
        (folder / "chat_template.jinja").write_text(folders.TEMPLATE)
    ours, theirs = pretrained_tokenizer(folder, 500).build(), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "Yes? 🙂"}]
    for prompt in (True, False):
        rendered = ours.render_chat(messages, prompt)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert ours.encode(rendered, specials=True).tolist() == expected


def test_a_place_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault, match="cannot write tokenizer"):
        OWN["bytes"].export(tmp_path / "file")


def test_never_is_the_only_special_field_that_a_tokenizers_own_files_do_not_have(tmp_path):
    OWN["bpe"].export(tmp_path)
    assert pretrained_tokenizer(tmp_path, 300).build().specials == replace(Specials(), never=())
