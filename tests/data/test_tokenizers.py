import collections
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigone.data.tokenizers import BPE, SPECIALS, Bytes, Tokenizer, Words
from epigone.errors import Fault, UserError

TEXT = [
    "The cat sat on the mat.",
    'And he said, "Where are my sons\' hill-country (the old one)?"',
    "It is the king's; the king's alone!",
] * 3
ALGORITHMS = [Bytes(), BPE(300), Words()]
TRAPS = ["<pad><bos><eos><unk>", "⟨eos⟩", " ".join(SPECIALS), "⟨pad⟩⟨unk⟩ eos </s>"]


@pytest.fixture(params=ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def algorithm(request):
    return request.param


def test_ids_0_to_3_are_the_specials(algorithm):
    tokenizer = algorithm.build(TEXT)
    assert [tokenizer.token(index) for index in range(4)] == list(SPECIALS)


@pytest.mark.parametrize("trap", TRAPS)
def test_text_that_spells_a_special_is_only_text(algorithm, trap):
    for training in (TEXT, TEXT + [trap] * 1000):
        ids = algorithm.build(training).encode(trap)
        unknown = {3} if isinstance(algorithm, Words) else set()
        assert set(ids.tolist()) & {0, 1, 2, 3} <= unknown


def test_words_of_special_strings_are_learned_as_the_marks_and_words_that_they_are():
    ids = Words().build(["⟨eos⟩ ⟨eos⟩"]).encode("⟨eos⟩")
    assert len(ids) == 3
    assert ids.min() > 3


def test_a_byte_is_its_value_plus_four():
    text = "Grüße, 世界\n\x00"
    np.testing.assert_array_equal(Bytes().build().encode(text), np.frombuffer(text.encode(), np.uint8) + 4)


BYTE_LEVEL = [Bytes().build(), BPE(300).build(TEXT)]


@given(st.text())
def test_byte_level_text_returns_whole(text):
    for tokenizer in BYTE_LEVEL:
        assert tokenizer.decode(tokenizer.encode(text)) == text


WORDS = Words().build([*TEXT, "\" ' - … % / _a_b x'y « € ”"])


@given(st.lists(st.integers(3, WORDS.size - 1)))
def test_words_survive_being_written_and_read(ids):
    np.testing.assert_array_equal(WORDS.encode(WORDS.decode(ids)), np.array(ids, np.int32))


def test_decoded_words_read_as_printed():
    text = 'and he said, "where are my sons\' hill-country (the old one)?"'
    assert WORDS.decode(WORDS.encode(text.upper())) == text


def test_words_are_cut_as_a_regular_expression_of_the_standard_library_cuts_them():
    text = " ".join(TEXT)
    pieces = re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.lower())
    assert [WORDS.token(index) for index in WORDS.encode(text)] == pieces


def test_words_are_ranked_by_count_and_limited():
    counts = collections.Counter(re.findall(r"\w+(?:'\w+)*|[^\w\s]", " ".join(TEXT).lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    assert [WORDS_ONLY.token(index) for index in range(4, WORDS_ONLY.size)] == ranked
    small = Words(max_size=9).build(TEXT)
    assert [small.token(index) for index in range(4, 9)] == ranked[:5]
    assert Words(min_count=4).build(TEXT).size == 4 + sum(count >= 4 for count in counts.values())


WORDS_ONLY = Words().build(TEXT)


def test_case_is_kept_on_request():
    tokenizer = Words(lowercase=False).build(TEXT)
    assert tokenizer.decode(tokenizer.encode("The cat")) == "The cat"
    assert 3 in tokenizer.encode("THE")


def test_an_unknown_word_stays_one_unknown_word():
    ids = WORDS.encode("the zebra sat")
    assert ids.tolist().count(3) == 1
    np.testing.assert_array_equal(WORDS.encode(WORDS.decode(ids)), ids)


def test_a_text_with_the_replacement_character_does_not_teach_it():
    tokenizer = Words().build(["a � b"])
    assert tokenizer.encode("�").tolist() == [3]


def test_training_is_deterministic_and_identity_is_the_content(algorithm):
    first, again = algorithm.build(TEXT), algorithm.build(iter(TEXT))
    assert first.identity == again.identity
    if not isinstance(algorithm, Bytes):
        assert first.identity != algorithm.build([*TEXT, "zebra zebra zebra zebra"]).identity


def test_saved_and_loaded_is_the_same(algorithm, tmp_path):
    tokenizer = algorithm.build(TEXT)
    path = tmp_path / "deep" / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert (loaded.identity, loaded.size, loaded.name) == (tokenizer.identity, tokenizer.size, tokenizer.name)
    for text in [*TEXT, *TRAPS]:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert [path.name for path in path.parent.iterdir()] == ["tokenizer.json"]


def test_bpe_learns_up_to_its_size():
    tokenizer = BPE(300).build(TEXT)
    assert 260 < tokenizer.size <= 300
    assert tokenizer.name == f"bpe-{tokenizer.size}"
    assert len(tokenizer.encode("the king's")) < len("the king's")


@pytest.mark.parametrize("damage", ["", "{", '{"model": 1}', "\x00\xff"])
def test_a_damaged_file_is_a_fault(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage.encode("latin-1"))
    with pytest.raises(Fault, match="damaged"):
        Tokenizer.load(path)


def test_a_missing_or_foreign_file_is_a_fault(tmp_path):
    with pytest.raises(Fault, match="cannot read"):
        Tokenizer.load(tmp_path / "none.json")
    import tokenizers

    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    foreign.save(str(tmp_path / "foreign.json"))
    with pytest.raises(Fault, match="foreign"):
        Tokenizer.load(tmp_path / "foreign.json")


def test_a_place_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault, match="cannot write tokenizer"):
        Bytes().build().save(tmp_path / "file" / "tokenizer.json")


@pytest.mark.parametrize(
    ("config", "texts", "message"),
    [
        (BPE(100), TEXT, "BPE vocab_size 100 < 260"),
        (Words(max_size=4), TEXT, "max_size 4 leaves no word"),
        (Words(), ["  "], "vocabulary is empty"),
        (Words(min_count=99), TEXT, "no word occurs 99 times"),
        (Words(), ["a \ud800"], "lone surrogate"),
        (BPE(300), ["a \ud800"], "lone surrogate"),
    ],
)
def test_what_cannot_be_trained_says_so(config, texts, message):
    with pytest.raises(UserError, match=message):
        config.build(texts)


def test_an_id_outside_is_an_error():
    for index in (-1, WORDS.size):
        with pytest.raises(UserError, match="outside the tokenizer"):
            WORDS.token(index)
