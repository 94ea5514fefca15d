"""Text on its way out: pieces are the whole, nothing is sent that is taken back, scores stand at their characters."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from epigone.arena.answers import Writing, offsets_of
from epigone.arena.engine import Told, Why
from epigone.data.tokenizers import BPE, Bytes, Words
from epigone.sampling.loop import Seen

BYTES = Bytes().build()
WORDS = Words().build(tiny.sentences(50))
PIECES = BPE(300).build(["the cat sees the dog and the dog sees the cat: “naïve”, she said; čeština 猫"] * 9)


def told(tokens, why=None, best=2):
    tokens = np.array(tokens, np.int32)
    own = -np.arange(len(tokens), dtype=np.float32)
    ids = np.stack([tokens, np.full_like(tokens, 7)], axis=1)
    return Told(tokens, Seen(own, ids, np.stack([own, own - 1], axis=1)[:, :best]), why)


def cut_up(tokens, cuts):
    """Tokens as they are told: some at a time."""
    borders = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(borders)]


def written(writing, parts, why=Why.LENGTH):
    """All pieces of a text that is told in parts, up to its end."""
    pieces = []
    for number, part in enumerate(parts):
        pieces.append(writing.add(told(part, why if number == len(parts) - 1 else None)))
        if pieces[-1].why is not None:
            break
    return pieces


def first_complete(tokenizer, tokens, stops):
    """The string that is there first while the text grows by tokens; of several at once the one that ends first."""
    decoder, text = tokenizer.stream_decoder(), ""
    for token in [*tokens, None]:
        text += decoder.end() if token is None else decoder.add([token])
        there = [stop for stop in stops if stop in text]
        if there:
            return [min(there, key=lambda stop: (text.find(stop) + len(stop), text.find(stop)))]
    return []


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES, WORDS])
@settings(max_examples=60, deadline=None)
@given(
    text=st.text("the cat seš 猫“”.;", max_size=25),
    cuts=st.lists(st.integers(0, 99), max_size=5),
    stops=st.lists(st.text("the ca猫.", min_size=1, max_size=3), max_size=2),
    scored=st.booleans(),
)
def test_pieces_are_the_whole_text_up_to_where_it_stops(tokenizer, text, cuts, stops, scored):
    tokens = tokenizer.encode(text).tolist()
    whole = tokenizer.decode(tokens)
    ends = [whole.find(stop) for stop in first_complete(tokenizer, tokens, stops)]
    pieces = written(Writing(tokenizer, stops, 1 if scored else None), cut_up(tokens, cuts))
    assert "".join(piece.text for piece in pieces) == whole[: min(ends, default=None)]
    assert pieces[-1].why == (Why.STOP if ends else Why.LENGTH)
    places = [place for piece in pieces for place in piece.places]
    if not scored:
        assert not places
    elif not ends:
        assert [place.token for place in places] == tokens
        assert [place.score for place in places] == [
            -float(n) for part in cut_up(tokens, cuts) for n in range(len(part))
        ]
    else:
        assert [place.token for place in places] == tokens[: len(places)]
        assert all(place.offset < max(1, min(ends)) for place in places)
        assert min(ends) == 0 or len(places) > 0


def test_nothing_is_sent_that_may_be_part_of_where_it_stops():
    writing = Writing(BYTES, ["end"], None)
    parts = [BYTES.encode(part) for part in ("so e", "n", " the en", "d of it")]
    assert [piece.text for piece in written(writing, parts)] == ["so ", "", "en the ", ""]


def test_where_a_text_stops_and_what_it_cost_do_not_depend_on_how_it_is_told():
    tokens = BYTES.encode("bbabbbcc").tolist()
    for size in (1, 2, 3, 8):
        writing = Writing(BYTES, ["a", "babb"], None)
        parts = [tokens[first : first + size] for first in range(0, 8, size)]
        assert "".join(piece.text for piece in written(writing, parts)) == "bb"
        assert writing.written == 3


def test_an_end_token_ends_a_text_and_is_no_part_of_it():
    eos = BYTES.specials.eos
    writing = Writing(BYTES, [], 0)
    piece = writing.add(told([*BYTES.encode("hi"), eos], Why.STOP))
    assert (piece.text, piece.why, len(piece.places), writing.written) == ("hi", Why.STOP, 2, 2)


def test_characters_that_come_in_parts_are_sent_whole():
    writing = Writing(BYTES, [], None)
    cat = BYTES.encode("猫")
    assert [writing.add(told([token])).text for token in cat] == ["", "", "猫"]
    assert writing.add(told(cat[:1], Why.LENGTH)).text == "\ufffd"  # that is all there is


def test_a_text_goes_on_from_what_stands_before_it():
    head, tail = WORDS.encode("the cat"), WORDS.encode("sees")
    assert Writing(WORDS, [], None, head.tolist()).add(told(tail, Why.LENGTH)).text == " sees"
    assert Writing(WORDS, [], None).add(told(tail, Why.LENGTH)).text == "sees"
    cat = BYTES.encode("猫").tolist()
    assert Writing(BYTES, [], None, cat[:2]).add(told(cat[2:], Why.LENGTH)).text == "猫"


def test_scores_that_are_not_shown_are_none():
    seen = Seen(np.array([np.nan, -1.0]), np.array([[3, -1], [4, 5]]), np.array([[-0.5, np.nan], [-1.0, -2.0]]))
    tokens = BYTES.encode("ab")
    places = Writing(BYTES, [], 2).add(Told(tokens, seen, Why.LENGTH)).places
    assert places[0][2:] == (None, [(3, -0.5)])
    assert places[1][2:] == (-1.0, [(4, -1.0), (5, -2.0)])
    assert Writing(BYTES, [], 0).add(Told(tokens, seen, Why.LENGTH)).places[1].best == []


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES, WORDS])
def test_offsets_count_the_characters_before_each_token(tokenizer):
    tokens = tokenizer.encode("the cat sees the dog.")
    text, offsets = offsets_of(tokenizer, tokens)
    assert text == tokenizer.decode(tokens)
    assert offsets[0] == 0
    for token, offset in zip(tokens, offsets, strict=True):
        assert text[offset:].lstrip().startswith(tokenizer.token(int(token)).strip())
