from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigone.evaluate import NGramIndex
from epigone.evaluate.diversity import seen

texts = st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=8)


def text(*rows):
    return [np.array(row, dtype=np.int32) for row in rows]


@given(texts)
def test_an_index_finds_its_own_text_and_its_counts_add_up(rows):
    index = NGramIndex.build(text(*rows), 6)
    assert index.order == 4
    for n in range(1, 5):
        ranks = index.ranks(text(*rows), n)
        assert index.counts[n - 1].sum() == len(ranks) == sum(max(0, len(row) - n + 1) for row in rows)
        assert np.array_equal(np.bincount(ranks, minlength=len(index.keys[n - 1])), index.counts[n - 1])
        assert np.all(np.diff(index.keys[n - 1]) > 0)


def test_a_border_between_documents_makes_no_ngram():
    apart, joined = (NGramIndex.build(text(*rows), 5) for rows in ([[1, 2], [3, 4]], [[1, 2, 3, 4]]))
    assert seen(text([2, 3]), apart, 2) == 0
    assert seen(text([2, 3]), joined, 2) == 1
    assert Counter(apart.counts[1].tolist()) == {1: 2}


def test_large_vocabularies_do_not_collide():
    # Base-V keys of 4-grams would need V^4 = 2^72 here.
    size = 2**18
    real = text([0, 0, 0, 1], [size - 1, size - 2, size - 3, size - 4])
    index = NGramIndex.build(real, size)
    assert seen(real, index, 4) == 1
    assert seen(text([1, 0, 0, 0], [size - 1, size - 2, size - 3, 0], [0, 0, 1, 1]), index, 4) == 0


def test_foreign_tokens_are_new_and_never_alias():
    index = NGramIndex.build(text([0, 1, 2]), 3)
    # 0 * 3 + 5 is the key of "1 2".
    assert index.ranks(text([0, 5]), 2).tolist() == [-1]
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        NGramIndex.build(text([3]), 3)
