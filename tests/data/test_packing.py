import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigone.data.packing import Rows, pack, pack_to
from epigone.errors import Fault, UserError
from epigone.models.language_model import Specials

LISTS = st.lists(st.lists(st.integers(4, 99), max_size=40), min_size=1, max_size=30)


def arrays(lists):
    return [np.array(ids, np.int32) for ids in lists]


def segments(rows):
    """Every segment as (tokens, targets), read position by position."""
    for planes_3T in rows.planes_R3T:
        tokens_T, targets_T, segments_T = planes_3T
        for segment in range(1, segments_T.max() + 1):
            places = np.flatnonzero(segments_T == segment)
            assert (np.diff(places) == 1).all()
            yield tuple(tokens_T[places].tolist()), tuple(targets_T[places].tolist())


def expected_pieces(lists, length, bos=1, eos=2):
    for ids in lists:
        tokens, targets = [bos, *ids], [*ids, eos]
        for start in range(0, len(tokens), length):
            yield tuple(tokens[start : start + length]), tuple(targets[start : start + length])


@given(LISTS, st.integers(1, 24))
def test_every_piece_of_every_document_occurs_once_and_nothing_else(lists, length):
    if sum(len(ids) + 1 for ids in lists) < length:
        return
    rows = pack(arrays(lists), length)
    assert sorted(segments(rows)) == sorted(expected_pieces(lists, length))
    assert rows.planes_R3T.shape == (len(rows), 3, length)
    assert rows.targets == sum(len(ids) + 1 for ids in lists)
    assert rows.fill == pytest.approx((rows.planes_R3T[:, 2] > 0).mean())


@given(LISTS, st.integers(1, 24))
def test_padding_is_at_the_end_and_all_zero(lists, length):
    if sum(len(ids) + 1 for ids in lists) < length:
        return
    planes_R3T = pack(arrays(lists), length).planes_R3T
    real_RT = planes_R3T[:, 2] > 0
    assert (np.diff(real_RT.astype(int), axis=1) <= 0).all()
    assert (planes_R3T.swapaxes(1, 2)[~real_RT] == 0).all()
    assert real_RT.any(axis=1).all()


def test_cut_documents_go_on_without_bos():
    rows = pack(arrays([range(10, 20)]), 4)
    assert sorted(segments(rows)) == [
        ((1, 10, 11, 12), (10, 11, 12, 13)),
        ((13, 14, 15, 16), (14, 15, 16, 17)),
        ((17, 18, 19), (18, 19, 2)),
    ]


@given(LISTS, st.integers(1, 24))
def test_specials_of_another_tokenizer_take_their_places(lists, length):
    if sum(len(ids) + 1 for ids in lists) < length:
        return
    rows = pack(arrays(lists), length, Specials(pad=7, bos=100, eos=100, unk=None, never=()))
    assert sorted(segments(rows)) == sorted(expected_pieces(lists, length, 100, 100))
    padding_R3T = rows.planes_R3T.swapaxes(1, 2)[rows.planes_R3T[:, 2] == 0]
    np.testing.assert_array_equal(padding_R3T, np.tile([7, 7, 0], (len(padding_R3T), 1)))


def test_packing_is_tight_and_deterministic():
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, 99, size) for size in rng.geometric(1 / 30, 3000)]
    rows = pack(documents, 128)
    assert rows.fill > 0.995
    np.testing.assert_array_equal(rows.planes_R3T, pack(documents, 128).planes_R3T)
    naive = np.mean([min(len(document) + 1, 128) / 128 for document in documents])
    assert naive < 0.5


@given(LISTS, st.integers(1, 12), st.integers(1, 50))
def test_packed_in_chunks_the_pieces_are_the_same(tmp_path_factory, lists, length, chunk):
    if sum(len(ids) + 1 for ids in lists) < length:
        return
    directory = tmp_path_factory.mktemp("rows") / "packed"
    rows = pack_to(directory, iter(arrays(lists)), length, chunk)
    assert isinstance(rows.planes_R3T, np.memmap)
    assert sorted(segments(rows)) == sorted(expected_pieces(lists, length))


def test_stored_rows_are_mapped_and_equal(tmp_path):
    rows = pack(arrays([range(4, 90), range(5, 9)]), 16)
    rows.save(tmp_path / "rows")
    opened = Rows.open(tmp_path / "rows")
    assert isinstance(opened.planes_R3T, np.memmap)
    np.testing.assert_array_equal(opened.planes_R3T, rows.planes_R3T)
    assert (opened.fill, opened.targets, opened.length) == (rows.fill, rows.targets, rows.length)


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_damaged_rows_are_a_fault(tmp_path, damage):
    directory = tmp_path / "rows"
    pack(arrays([range(4, 90)]), 16).save(directory)
    file = directory / "rows.int32"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "header":
        (directory / "rows.json").write_text('{"rows": 1}')
    else:
        file.unlink()
    with pytest.raises(Fault, match=r"damaged|no finished rows"):
        Rows.open(directory)


def test_a_full_disk_is_a_fault_and_leaves_nothing(tmp_path):
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import numpy as np
from pathlib import Path
from epigone.data.packing import pack
from epigone.errors import Fault
try:
    pack([np.arange(4, 90000)], 16).save(Path({str(tmp_path)!r}) / "rows")
except Fault as fault:
    print(fault)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=small_files_only
    )
    assert done.stdout == f"cannot write rows {tmp_path / 'rows'}: File too large\n"
    assert list(tmp_path.iterdir()) == []


def small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


@pytest.mark.parametrize(
    ("lists", "length", "message"),
    [
        ([], 8, "no document"),
        ([[5, 6], []], 8, "the text has 4 tokens, one sequence needs 8"),
        ([[5]], 0, "sequence length 0 < 1"),
    ],
)
def test_too_little_text_says_so(lists, length, message):
    with pytest.raises(UserError, match=message):
        pack(arrays(lists), length)
