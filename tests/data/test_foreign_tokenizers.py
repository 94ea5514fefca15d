import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from data import tokenizer_folders as folders
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from epigone.data.foreign_tokenizers import PretrainedTokenizer, pretrained_tokenizer
from epigone.data.tokenizers import Tokenizer
from epigone.errors import Fault, UserError
from epigone.identity import canonical, fingerprint, restore
from epigone.models.language_model import Specials

SIZE = 1024
TEXTS = [
    *folders.TEXT[:4],
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\r\nlines\n\n\nmore",
    "1 22 333 4444 55555 ½ ٣",
    "naïve 世界 🙂 👨‍👩‍👧 é \u00e9 \ufdd0 \x00 \ufffd",
    "CAMELCase snake_case he's HE'LL",
]
SPELLED = [
    "a<s>b </s> c<unk>",
    "</s>",
    " <|endoftext|> <|begin_of_text|>x<|eot_id|>\n<|user|>",
    "[PAD] [EOS] x[EOS] [UNK]",
]


class Pair:
    """A tokenizer and transformers' one of the same folder, which reads special tokens in the text or does not."""

    def __init__(self, folder):
        self.folder = folder
        self.ours = pretrained_tokenizer(folder, SIZE).build()
        self.reading = AutoTokenizer.from_pretrained(folder)
        self.splitting = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    return {kind.__name__: Pair(folders.write(place / kind.__name__, kind)) for kind in folders.KINDS}


@pytest.fixture(params=[kind.__name__ for kind in folders.KINDS])
def pair(request, pairs):
    return pairs[request.param]


def agree(pair, text):
    plain = pair.ours.encode(text)
    assert plain.dtype == np.int32
    assert plain.tolist() == pair.splitting(text, add_special_tokens=False).input_ids
    read = pair.ours.encode(text, specials=True)
    assert read.tolist() == pair.reading(text, add_special_tokens=False).input_ids
    shown = {"clean_up_tokenization_spaces": False}
    for ids in (plain, read):
        assert pair.ours.decode(ids) == pair.reading.decode(ids, skip_special_tokens=True, **shown)
        assert pair.ours.decode(ids, specials=True) == pair.reading.decode(ids, **shown)


def test_ids_and_text_are_those_of_transformers(pair):
    for text in TEXTS:
        agree(pair, text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_ids_and_text_of_any_string_are_those_of_transformers(pairs, text):
    for pair in pairs.values():
        agree(pair, text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_text_returns_whole(pairs, text):
    for name in ("gpt2", "llama3"):
        assert pairs[name].ours.decode(pairs[name].ours.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, SIZE - 1), max_size=30))
def test_any_ids_decode_as_in_transformers(pairs, ids):
    for pair in pairs.values():
        assert pair.ours.decode(ids) == pair.reading.decode(ids, skip_special_tokens=True)


def test_special_tokens_that_are_spelled_out_are_read_on_request_alone(pair):
    special = {index for index, token in pair.ours.inner.get_added_tokens_decoder().items() if token.special}
    unknown = {pair.ours.specials.unk} if pair.folder.name == "words" else set()
    found = set()
    for text in SPELLED:
        read = pair.ours.encode(text, specials=True).tolist()
        assert read == pair.reading(text, add_special_tokens=False).input_ids
        found |= special & set(read)
        assert not (special - unknown) & set(pair.ours.encode(text).tolist())
        if not unknown:
            assert pair.ours.decode(pair.ours.encode(text)).replace(" ", "") == text.replace(" ", "")
    assert found


def test_the_librarys_own_switch_alone_would_let_special_tokens_through(pairs):
    """What `plain_text` is for: a merge, a Unigram's vocabulary and a word that spell a special token."""
    for name, text in (("llama2", "</s>"), ("unigram", "</s>"), ("words", "[PAD]")):
        pair = pairs[name]
        assert pair.reading.convert_tokens_to_ids(text) in pair.splitting(text).input_ids
        assert pair.reading.convert_tokens_to_ids(text) not in pair.ours.encode(text)


def test_batches_are_encoded_as_single_texts(pair):
    for one, ids in zip(TEXTS, pair.ours.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, pair.ours.encode(one))


def test_tokens_are_shown_with_the_space_before_them(pair):
    ids = pair.ours.encode("The cat sat on the mat,")
    shown = "".join(pair.ours.token(index) for index in ids)
    assert shown.lstrip() == ("Thecatsatonthemat," if pair.folder.name == "words" else "The cat sat on the mat,")


def test_ids_without_a_token_are_shown_as_such_and_written_as_nothing(pair):
    assert pair.ours.token(SIZE - 1) == f"⟨unused {SIZE - 1}⟩"
    assert pair.ours.decode([SIZE - 1]) == ""
    for index in (-1, SIZE):
        with pytest.raises(UserError, match="outside the tokenizer"):
            pair.ours.token(index)


def test_saved_and_loaded_is_the_same(pair, tmp_path):
    pair.ours.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.conventions == pair.ours.conventions
    assert (loaded.identity, loaded.name, loaded.size) == (pair.ours.identity, pair.ours.name, SIZE)
    for text in [*TEXTS, *SPELLED]:
        for specials in (False, True):
            np.testing.assert_array_equal(loaded.encode(text, specials), pair.ours.encode(text, specials))


def test_a_damaged_file_of_ours_is_a_fault(pairs, tmp_path):
    path = tmp_path / "t.json"
    pairs["gpt2"].ours.save(path)
    whole = json.loads(path.read_text())
    for damage in ({"tokenizer": {}}, {"conventions": {}}, {"conventions": whole["conventions"] | {"more": 1}}):
        path.write_text(json.dumps(whole | damage))
        with pytest.raises(Fault, match="damaged"):
            Tokenizer.load(path)


def ids_of(tokenizer, *tokens):
    return tuple(tokenizer.inner.token_to_id(token) for token in tokens)


def test_special_ids_come_from_the_folders_files(pairs, tmp_path):
    gpt2, words = pairs["gpt2"].ours, pairs["words"].ours
    (end,) = ids_of(gpt2, "<|endoftext|>")
    assert gpt2.specials == Specials(pad=end, bos=end, eos=end, unk=end, never=())
    # No bos: documents begin after an eos.
    pad, eos, unk = ids_of(words, "[PAD]", "[EOS]", "[UNK]")
    assert words.specials == Specials(pad=pad, bos=eos, eos=eos, unk=unk, never=())


def test_generation_config_adds_ends_a_beginning_and_what_is_never_drawn(tmp_path):
    folder = folders.write(tmp_path, folders.llama3, bos_token=None)
    begin, end, turn, user = range(340, 344)
    generation = {"eos_token_id": [end, turn, end], "bos_token_id": begin, "suppress_tokens": [user]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    specials = pretrained_tokenizer(folder, SIZE).build().specials
    assert specials == Specials(pad=turn, bos=begin, eos=turn, unk=None, stops=(end,), never=(user,))
    chosen = pretrained_tokenizer(folder, SIZE, bos="<|end_of_text|>").build()
    assert chosen.specials.bos == end
    assert chosen.conventions.names["bos_token"] == "<|end_of_text|>"


def test_a_map_of_special_tokens_is_read_where_the_config_is_silent(tmp_path):
    folder = folders.write(tmp_path, folders.unigram, eos_token=None, pad_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<s>"}))
    specials = pretrained_tokenizer(folder, SIZE).build().specials
    assert (specials.eos, specials.pad) == (2, 1)


def test_a_named_token_is_special_as_in_transformers_even_where_the_tokenizer_does_not_say_so(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[EOS]": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = pretrained_tokenizer(tmp_path, 3).build(), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("a[EOS]a", specials=True).tolist() == theirs("a[EOS]a").input_ids == [0, 1, 0]
    assert ours.encode("a [EOS] a").tolist() == [0, 2, 0]
    assert ours.decode([0, 1, 0]) == theirs.decode([0, 1, 0], skip_special_tokens=True)


def test_truncation_padding_and_dropout_of_a_training_do_not_reach_the_text(tmp_path):
    inner, config = folders.gpt2()
    expected = inner.encode(TEXTS[0]).ids
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.model.dropout = 0.5
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = pretrained_tokenizer(tmp_path, SIZE).build()
    for _ in range(5):
        assert tokenizer.encode(TEXTS[0]).tolist() == expected


def test_the_place_is_no_part_of_the_config_and_what_any_file_says_of_tokens_is(tmp_path):
    first = pretrained_tokenizer(folders.write(tmp_path / "a", folders.gpt2), SIZE)
    other = pretrained_tokenizer(folders.write(tmp_path / "b", folders.gpt2), SIZE)
    assert (first.digest, first.build().identity) == (other.digest, other.build().identity)
    assert first.path != other.path
    assert fingerprint(first) == fingerprint(other) != fingerprint(replace(first, bos="<|endoftext|>"))
    assert restore(canonical(first)) == first
    assert isinstance(first, PretrainedTokenizer)
    digests = [first.digest]
    changes = {
        "tokenizer_config.json": '{"model_max_length": 77}',
        "special_tokens_map.json": '{"pad_token": "a"}',
        "generation_config.json": '{"eos_token_id": 5}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in changes.items():
        (tmp_path / "a" / name).write_text(text)
        digests.append(pretrained_tokenizer(tmp_path / "a", SIZE).digest)
    assert len(set(digests)) == 5
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.6}')
    assert pretrained_tokenizer(tmp_path / "a", SIZE).digest == digests[-1]
    with pytest.raises(UserError, match="no longer the one that was imported"):
        first.build()


def test_a_model_stops_where_transformers_stops_it(tmp_path):
    """At the ids of generation_config.json; without that file at those of config.json; or else at eos_token."""
    folder = folders.write(tmp_path / "a", folders.gpt2)
    (folder / "generation_config.json").unlink(missing_ok=True)

    def ends(**files):
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        specials = pretrained_tokenizer(folder, SIZE).build().specials
        return specials.eos, specials.stops

    eos, _ = ends(config={})
    assert ends(config={"eos_token_id": None}) == (eos, ())
    assert ends(config={"eos_token_id": [7, eos, 9]}) == (eos, (7, 9))
    assert ends(config={"text_config": {"eos_token_id": 7}}) == (7, ())
    assert ends(generation_config={"eos_token_id": [4, 5]}) == (4, (5,))
    (folder / "generation_config.json").write_text('{"eos_token_id": [[1]]}')
    with pytest.raises(UserError, match="eos_token_id"):
        pretrained_tokenizer(folder, SIZE).build()


def test_the_further_special_tokens_are_given_on(tmp_path):
    folder = folders.write(tmp_path / "a", folders.gpt2)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["extra_special_tokens"] = [{"content": "a", "special": True}, "b"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    pretrained_tokenizer(folder, SIZE).build().export(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {"a", "b"} < set(theirs.all_special_tokens)


def broken(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json: load it with transformers"),
        (
            lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
            r"has tokenizer\.model and no tokenizer\.json",
        ),
        (lambda folder: broken(folder, "tokenizer.json", "{"), r"tokenizer\.json' is damaged"),
        (lambda folder: broken(folder, "tokenizer.json", '{"model": {}}'), r"tokenizer\.json' is damaged"),
        (lambda folder: broken(folder, "tokenizer_config.json", "["), r"tokenizer_config\.json' is damaged"),
        (lambda folder: broken(folder, "tokenizer_config.json", "[]"), "it holds no object"),
        (lambda folder: broken(folder, "tokenizer_config.json", '{"eos_token": {"a": 1}}'), "are damaged: KeyError"),
        (lambda folder: broken(folder, "generation_config.json", '{"eos_token_id": 4444}'), "special token id 4444 is"),
        (lambda folder: broken(folder, "generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id \\[.x.\\]"),
        (lambda folder: broken(folder, "tokenizer_config.json", "{}"), "names no eos_token"),
        (lambda folder: folders.write(folder, folders.gpt2, pad_token="[PAD]"), r"pad_token '\[PAD\]' is no token"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, change, message):
    folder = folders.write(tmp_path / "folder", folders.gpt2)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        pretrained_tokenizer(folder, SIZE).build()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    folder = folders.write(tmp_path, folders.llama3)
    with pytest.raises(UserError, match="special token id 342 is none of the model's 342 ids"):
        pretrained_tokenizer(folder, 342).build()
    with pytest.raises(UserError, match=r"token '.*' has id 20, and the model has only 20 ids"):
        pretrained_tokenizer(folders.write(tmp_path / "other", folders.words, eos_token="[PAD]"), 20).build()
    # Special tokens beyond the table are allowed while no text has them, as in Gemma 3.
    tokenizer = pretrained_tokenizer(folder, 343).build()
    with pytest.raises(UserError, match=r"the text has '<\|user\|>', id 343; the model has 343 ids"):
        tokenizer.encode("<|user|>", specials=True)
    assert tokenizer.encode("<|user|>").max() < 340


def test_a_bos_that_is_no_token_is_refused(tmp_path):
    folder = folders.write(tmp_path, folders.gpt2)
    with pytest.raises(UserError, match="bos_token '<bos>' is no token"):
        pretrained_tokenizer(folder, SIZE, bos="<bos>").build()
