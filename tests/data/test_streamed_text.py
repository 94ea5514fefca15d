import pytest
from data import tokenizer_folders as folders
from hypothesis import given, settings
from hypothesis import strategies as st

from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.data.tokenizers import BPE, Bytes, Words

OWN = [Bytes().build(), BPE(300).build(folders.TEXT), Words().build([*folders.TEXT, '" \' - ( ) . a "b"'])]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    kinds = [folders.write(place / kind.__name__, kind) for kind in folders.KINDS]
    return [*OWN, *(pretrained_tokenizer(folder, 450).build() for folder in kinds)]


def streamed(tokenizer, ids, sizes):
    decoder, pieces, at = tokenizer.stream_decoder(), [], 0
    for size in sizes:
        pieces.append(decoder.add(ids[at : at + size]))
        at += size
    return [*pieces, decoder.add(ids[at:]), decoder.end()]


CUTS = st.lists(st.integers(0, 5), max_size=20)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), cuts=CUTS)
def test_the_pieces_of_a_text_are_the_text_and_no_half_characters(tokenizers, text, cuts):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids, cuts)
        whole = tokenizer.decode(ids)
        assert "".join(pieces) == whole
        # Whatever was shown on the way is what the text begins with: nothing had to be taken back.
        assert "".join(pieces).count("\N{REPLACEMENT CHARACTER}") == whole.count("\N{REPLACEMENT CHARACTER}")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 259), max_size=30), cuts=CUTS)
def test_the_pieces_of_any_ids_are_their_text(tokenizers, ids, cuts):
    for tokenizer in tokenizers:
        pieces = streamed(tokenizer, [index % tokenizer.size for index in ids], cuts)
        assert "".join(pieces) == tokenizer.decode([index % tokenizer.size for index in ids])


def test_a_character_of_many_tokens_comes_when_it_is_whole():
    tokenizer = OWN[0]
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("é🙂x")
    assert [decoder.add([index]) for index in ids] == ["", "é", "", "", "", "🙂", "x"]
    assert decoder.end() == ""
    # The naive way shows what is no part of the text.
    assert "\N{REPLACEMENT CHARACTER}" in "".join(tokenizer.decode([index]) for index in ids)


def test_text_comes_as_soon_as_it_is_certain(tokenizers):
    for tokenizer in tokenizers:
        ids = tokenizer.encode("the cat sat on the mat,")
        decoder = tokenizer.stream_decoder()
        shown = "".join(decoder.add([index]) for index in ids)
        assert shown == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_shown_as_what_it_is_and_another_text_may_begin():
    tokenizer = OWN[0]
    decoder = tokenizer.stream_decoder()
    assert decoder.add(tokenizer.encode("aé")[:2]) == "a"
    assert decoder.end() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.add(tokenizer.encode("bc")) == "bc"
