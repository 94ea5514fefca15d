import collections
import itertools

import numpy as np
import pytest
from scipy import stats

from epigone.data.pipeline import Batches, pack
from epigone.errors import UserError

LENGTH = 16


def source(first, documents=60, seed=0):
    """Rows of documents whose first token names the document."""
    rng = np.random.default_rng(seed)
    return pack([np.r_[first + i, rng.integers(4, 50, rng.integers(0, 30))] for i in range(documents)], LENGTH)


ROWS = source(1000)


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def events(batch):
    """Every (whole context within its segment, target) of positive weight, read position by position."""
    for row in range(len(batch.tokens_BT)):
        context = []
        for place in range(LENGTH):
            if batch.weights_BT[row, place] == 0:
                continue
            if batch.positions_BT[row, place] == 0:
                context = []
            context.append(int(batch.tokens_BT[row, place]))
            yield tuple(context), int(batch.targets_BT[row, place])


def row_events(rows):
    for tokens_T, targets_T, segments_T in rows.planes_R3T:
        for _, group in itertools.groupby(range(LENGTH), lambda place: segments_T[place]):  # noqa: B023
            places = list(group)
            if segments_T[places[0]]:
                for stop in range(len(places)):
                    yield tuple(tokens_T[places[: stop + 1]].tolist()), int(targets_T[places[stop]])


def test_each_epoch_has_every_event_once_in_a_new_order():
    sources = [ROWS, source(2000, 37, seed=1)]
    batches = Batches(sources, None, 1, seed=3)
    per_epoch = batches.rows_per_epoch
    epochs = [[batches.batch(epoch * per_epoch + step) for step in range(per_epoch)] for epoch in range(3)]
    expected = collections.Counter(event for rows in sources for event in row_events(rows))
    for epoch in epochs:
        assert collections.Counter(event for batch in epoch for event in events(batch)) == expected
    orders = [tuple(batch.tokens_BT.tobytes() for batch in epoch) for epoch in epochs]
    assert len(set(orders)) == 3
    assert batches.tokens_per_epoch == expected.total()


def test_fields_agree_with_their_definitions():
    batch = Batches([ROWS], None, 8, seed=0).batch(5)
    for row in range(8):
        seen = {}
        for place in range(LENGTH):
            segment = batch.segments_BT[row, place]
            assert batch.weights_BT[row, place] == (segment > 0)
            assert batch.positions_BT[row, place] == (seen.get(segment, 0) if segment else 0)
            seen[segment] = seen.get(segment, 0) + 1
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    assert all(field.flags.c_contiguous for field in batch)


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_slices_of_all_processes_are_the_single_process_batch(weights, count):
    sources = [ROWS, source(2000, 20, seed=1)]
    single = Batches(sources, weights, 12, seed=9)
    shares = [Batches(sources, weights, 12, 9, index, count) for index in range(count)]
    for step in (0, 1, 17, 12345):
        joined = [np.concatenate(parts) for parts in zip(*(share.batch(step) for share in shares), strict=True)]
        assert equal(joined, single.batch(step))


def test_a_run_goes_on_from_its_step_on_another_number_of_processes():
    sources, weights = [ROWS, source(2000, 20, seed=1)], [1.0, 2.0]
    before = list(itertools.islice(Batches(sources, weights, 12, 9).iterate(), 30))
    after = [Batches(sources, weights, 12, 9, index, 3).iterate(11) for index in range(3)]
    for step in range(11, 30):
        joined = [np.concatenate(parts) for parts in zip(*(next(share) for share in after), strict=True)]
        assert equal(joined, before[step])


def test_iterating_gives_batch_after_batch():
    batches = Batches([ROWS], None, 4, seed=2)
    for step, batch in enumerate(itertools.islice(batches.iterate(5), 40), 5):
        assert equal(batch, batches.batch(step))


def test_seed_decides_the_order():
    first, same, other = (Batches([ROWS], None, 8, seed=seed).batch(0) for seed in (0, 0, 1))
    assert equal(first, same)
    assert not equal(first, other)


def origins(batches, steps):
    """How many rows of `steps` batches come from each source, told by the largest token."""
    largest = np.concatenate([batches.batch(step).tokens_BT.max(axis=1) for step in range(steps)])
    return np.array([(largest < 2000).sum(), (largest >= 2000).sum()])


def one_document_rows(first):
    return pack([np.full(LENGTH - 1, first + i, np.int32) for i in range(40)], LENGTH)


def test_sources_are_mixed_by_weight_and_not_by_size():
    sources = [one_document_rows(1000), one_document_rows(2000), one_document_rows(2500)]
    counts = origins(Batches(sources, [3, 0.5, 0.5], 10, seed=0), 200)
    assert stats.chisquare(counts, np.array([0.75, 0.25]) * 2000).pvalue > 0.01
    by_size = origins(Batches(sources, None, 10, seed=0), 200)
    assert stats.chisquare(by_size, np.array([0.75, 0.25]) * 2000).pvalue < 1e-6


def test_two_sources_of_one_size_are_not_shuffled_alike():
    sources = [one_document_rows(1000), one_document_rows(2000)]
    tokens = np.concatenate([Batches(sources, [1, 1], 10, seed=0).batch(step).tokens_BT[:, 1] for step in range(40)])
    first, second = tokens[tokens < 2000] - 1000, tokens[tokens >= 2000] - 2000
    for epoch in range(4):
        assert (first[:40] != second[epoch * 40 : epoch * 40 + 40]).any()


def test_tokens_per_step_is_the_mean_over_an_epoch():
    batches = Batches([source(1000, 7, seed=4), ROWS], None, 2, seed=0)
    steps = batches.rows_per_epoch  # two epochs of two rows a step
    counted = np.mean([batches.batch(step).weights_BT.sum() for step in range(steps)])
    assert batches.tokens_per_step == pytest.approx(counted)
    assert batches.fill == pytest.approx(counted / (2 * LENGTH))


def test_rows_stored_on_disk_give_the_same_batches(tmp_path):
    ROWS.save(tmp_path / "rows")
    stored = type(ROWS).open(tmp_path / "rows")
    assert equal(Batches([stored], None, 8, 0).batch(3), Batches([ROWS], None, 8, 0).batch(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None, 4, 0), "none at all"),
        (([ROWS, pack([np.arange(4, 90)], 8)], None, 4, 0), r"not \[8, 16\]"),
        (([ROWS], [0.5, 0.5], 4, 0), "not 1 positive numbers"),
        (([ROWS], [0.0], 4, 0), "not 1 positive numbers"),
        (([ROWS], [float("nan")], 4, 0), "not 1 positive numbers"),
        (([ROWS], None, 4, 0, 0, 3), "a batch of 4 rows cannot be shared by 3 processes"),
        (([ROWS], None, 0, 0), "a batch of 0 rows"),
    ],
)
def test_what_does_not_fit_says_so(arguments, message):
    with pytest.raises(UserError, match=message):
        Batches(*arguments)
