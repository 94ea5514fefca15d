import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigone.errors import UserError
from epigone.evaluate import evaluation_contexts, predictions


def test_contexts_are_true_prefixes_and_the_draw_repeats(bigram):
    documents = bigram.drawn(9, 0, concentration=2.0).write(3000, 1)
    contexts = evaluation_contexts(documents, 300, seed=4)
    again = evaluation_contexts(documents, 300, seed=4)
    other = evaluation_contexts(documents, 300, seed=5)
    assert len(contexts) == 300
    events = {(*d[:n].tolist(), -1, int([*d, 2][n])) for d in documents for n in range(len(d) + 1)}
    assert {(*p.tolist(), -1, int(t)) for p, t in zip(contexts.prefixes, contexts.targets_M, strict=True)} <= events
    assert contexts.targets_M.tolist() == again.targets_M.tolist() != other.targets_M.tolist()
    lengths = [len(p) for p in contexts.prefixes]
    assert lengths == sorted(lengths)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 60), st.integers(0, 9))
def test_every_event_is_drawn_at_most_once(lengths, count, longest):
    documents = [np.arange(3, 3 + n) + 100 * i for i, n in enumerate(lengths)]
    contexts = evaluation_contexts(documents, count, longest=longest)
    available = sum(min(n, longest) + 1 for n in lengths)
    assert len(contexts) == min(count, available)
    if count >= available:
        assert sorted(len(p) for p in contexts.prefixes) == sorted(
            k for n in lengths for k in range(min(n, longest) + 1)
        )
        ends = sum(n <= longest for n in lengths)
        assert np.count_nonzero(contexts.targets_M == 2) == ends
        other = evaluation_contexts(documents, count, longest=longest, eos=50_000)
        np.testing.assert_array_equal(other.targets_M, np.where(contexts.targets_M == 2, 50_000, contexts.targets_M))


def test_events_are_drawn_evenly():
    documents = [np.full(9, 5), np.full(1, 6)]
    draws = [evaluation_contexts(documents, 1, seed).targets_M[0] for seed in range(1200)]
    # 12 events: nine 5s, one 6, two ends.
    assert np.mean(np.array(draws) == 2) == pytest.approx(2 / 12, abs=4 * np.sqrt(1 / 6 * 5 / 6 / 1200))


def test_no_documents_is_the_users_error():
    with pytest.raises(UserError, match="0 held-out documents"):
        evaluation_contexts([], 10)


class Letters:
    def decode(self, ids):
        return "".join("__.abcdef"[i] for i in ids)

    def token(self, i):
        return "__.abcdef"[i]


def test_predictions_are_ranked_and_never_impossible(bigram):
    rows = np.tile([0, 0, 0.5, 0.1, 0.4, 0, 0], (7, 1))
    shown = predictions(bigram(rows), [np.array([3, 4]), np.array([], dtype=np.int32)], Letters(), top=4)
    assert [row["context"] for row in shown] == ["ab", ""]
    assert [token for token, _ in shown[0]["top"]] == [".", "b", "a"]
    assert [p for _, p in shown[0]["top"]] == pytest.approx([0.5, 0.4, 0.1])
