"""Bytes of tokens, of every kind of tokenizer; and where two tokenizations of a text meet."""

from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from data.tokenizer_folders import KINDS, TEXT, gemma, gpt2, llama2, unigram, words, write

from epigone.data.byte_alignment import align
from epigone.data.conventions import Conventions
from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.data.token_bytes import TokenBytes, common_ids
from epigone.data.tokenizers import BPE, Bytes, Tokenizer, Words
from epigone.errors import UserError
from epigone.models.language_model import Specials

HARD = [*TEXT[:4], "naïve 世界 🎓 e\u0301", " two  spaces ", "\n\n\ttabs\n", "", "ß", "</s> <|eot_id|> [PAD]"]


@pytest.fixture(scope="module")
def trained():
    return {"bytes": Bytes().build(), "bpe": BPE(300).build(TEXT), "words": Words(lowercase=False).build(TEXT)}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind.__name__: pretrained_tokenizer(write(folder / kind.__name__, kind), 700).build() for kind in KINDS}


def every(trained, foreign):
    return trained | {f"{name} of others": tokenizer for name, tokenizer in foreign.items()}


def test_joined_they_are_the_text_and_each_text_is_encoded_as_before(trained, foreign):
    for name, tokenizer in every(trained, foreign).items():
        of = TokenBytes(tokenizer)
        for text in HARD:
            ids = tokenizer.encode(text)
            assert b"".join(of.pieces(ids)).decode(errors="replace") == tokenizer.decode(ids), name
            found, ends = of.encode(text.encode())
            np.testing.assert_array_equal(found, ids, err_msg=name)
            assert (np.diff(ends, prepend=0) >= 0).all()
            assert not len(ends) or ends[-1] <= len(text.encode())


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2 of others", "llama3 of others", "llama2 of others"])
def test_bytes_come_back_exactly_also_where_a_character_is_cut(trained, foreign, kind):
    of = TokenBytes(every(trained, foreign)[kind])
    split = 0
    for text in HARD:
        ids, ends = of.encode(text.encode())
        pieces = of.pieces(ids)
        assert b"".join(pieces) == text.encode()
        np.testing.assert_array_equal(ends, np.cumsum([len(piece) for piece in pieces]))
        split += sum(_is_part(piece) for piece in pieces)
    assert split > 5


def _is_part(piece):
    try:
        piece.decode()
    except UnicodeDecodeError:
        return True
    return False


def test_what_is_no_text_has_no_token(trained):
    for name in ("bytes", "bpe"):
        of = TokenBytes(trained[name])
        ids, ends = of.encode(b"\xffab\xe4\xb8c")
        assert b"".join(of.pieces(ids)) == b"abc"
        assert ends[-1] == 6


def test_specials_have_none_and_unknown_words_are_written(trained, foreign):
    for tokenizer in every(trained, foreign).values():
        of = TokenBytes(tokenizer)
        ids = [tokenizer.specials.bos, *tokenizer.encode("cat"), tokenizer.specials.eos]
        pieces = of.pieces(ids)
        assert (pieces[0], pieces[-1]) == (b"", b"")
        assert b"".join(pieces) == b"cat"
    assert TokenBytes(trained["words"]).pieces(trained["words"].encode("The zebra sat.")) == [
        b"The",
        " \ufffd".encode(),
        b" sat",
        b".",
    ]


def test_a_text_that_goes_on_keeps_its_space(trained, foreign):
    for name, tokenizer in every(trained, foreign).items():
        of = TokenBytes(tokenizer)
        whole = tokenizer.encode("The cat sat")
        end = len(whole) // 2
        joined = b"".join([*of.pieces(whole[:end]), *of.pieces(whole[end:], start=False)])
        assert joined == b"The cat sat", name


def test_a_text_that_is_changed_first_is_known_by_the_librarys_spans():
    of = TokenBytes(Words(lowercase=True).build(TEXT))
    text = "The CAT  sat on İ 世界,\n won't he?"
    _, ends = of.encode(text.encode())
    assert [text.encode()[:end].decode()[-3:] for end in ends[:3]] == ["The", "CAT", "sat"]
    assert ends[-1] == len(text.encode())


def test_a_tokenizer_whose_bytes_are_not_known_is_refused():
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.decoder = tokenizers.decoders.WordPiece()
    other = Tokenizer(inner, Conventions(2, Specials(1, 1, 1, 1), {}, None, {}))
    with pytest.raises(UserError, match="writes text by WordPiece, and the bytes of its tokens are not known"):
        TokenBytes(other)


def test_common_ids_are_of_the_same_bytes(trained, foreign):
    tokenizers = [TokenBytes(tokenizer) for tokenizer in every(trained, foreign).values()]
    for ours in tokenizers:
        for theirs in tokenizers:
            found = common_ids(ours, theirs)
            assert len(found) == ours.tokenizer.size
            used = found[found >= 0]
            assert len(np.unique(used)) == len(used)
            if ours is theirs:
                np.testing.assert_array_equal(found, np.arange(ours.tokenizer.size))
                continue
            eos = ours.tokenizer.specials.eos
            no_text = np.array([not piece for piece in ours.table]) & (np.arange(len(found)) != eos)
            np.testing.assert_array_equal(found == -2, no_text)
            assert found[eos] == theirs.tokenizer.specials.eos
            for index in np.flatnonzero(found >= 0):
                if index != eos:
                    assert ours.table[index] == theirs.table[found[index]] != b""
    bpe, gpt = (TokenBytes(every(trained, foreign)[name]) for name in ("bpe", "gpt2 of others"))
    assert (common_ids(bpe, gpt) >= 0).sum() > 250


def slow(borders, others):
    """The definition, token by token."""
    common = sorted(set(borders) & set(others))

    def of(x):
        found, bad = [], set()
        for begin, end in pairwise(x):
            inside = [k for k in range(len(common) - 1) if common[k] <= begin < common[k + 1]]
            found.append(inside[0] if inside and end > begin and end <= common[inside[0] + 1] else -1)
            if inside and end == begin and begin > common[inside[0]]:
                bad.add(inside[0])
        return found, bad

    (mine, bad), (theirs, worse) = of(list(borders)), of(list(others))
    rid = lambda x: [-1 if k in bad | worse else k for k in x]  # noqa: E731
    match = [
        max((u for u in range(len(others) - 1) if others[u] == begin), default=-1)
        if t + 1 >= len(borders) or borders[t + 1] != begin
        else -1
        for t, begin in enumerate(list(borders)[:-1])
    ]
    last = len(others) - 1
    match = [-1 if u >= 0 and others[last] == others[u] else u for u in match]
    return match, rid(mine), rid(theirs)


def test_alignment_is_that_of_the_definition():
    draw = np.random.default_rng(0)
    for _ in range(300):
        length = int(draw.integers(0, 12))
        sides = [np.sort(np.append(draw.integers(0, length + 1, draw.integers(0, 9)), [0, length])) for _ in range(2)]
        if draw.uniform() < 0.3:
            sides[1] = sides[1][1:]  # one that begins later
        if len(sides[1]) < 2:
            continue
        found = align(*sides)
        for mine, wanted in zip(found, slow(*sides), strict=True):
            assert mine.tolist() == wanted, sides


def test_chunks_hold_the_same_bytes_on_both_sides(foreign):
    kinds = [TokenBytes(foreign[kind.__name__]) for kind in (gpt2, llama2, gemma, unigram, words)]
    for text in HARD[:5]:
        for ours in kinds:
            ids, ends = ours.encode(text.encode())
            for theirs in kinds:
                _, others = theirs.encode(text.encode())
                found = align(np.append(0, ends), np.append(0, others))
                sizes = [np.diff(np.append(0, x)) for x in (ends, others)]
                for chunk in np.unique(found.chunk_N[found.chunk_N >= 0]):
                    at = [found.chunk_N == chunk, found.chunk_M == chunk]
                    assert sizes[0][at[0]].sum() == sizes[1][at[1]].sum() > 0
                if ours is theirs:
                    np.testing.assert_array_equal(found.match_N[np.diff(np.append(0, ends)) > 0] >= 0, True)
            assert len(ids) == len(ends)
