"""Shards of scores: found by content, whole or absent, damaged ones told, work shared by claims."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from epigone.errors import Fault
from epigone.teachers import score_files
from epigone.teachers.score_files import Claims, ScoreFiles, segments


def keys(count, seed=0):
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)]


def test_segments_are_found_with_a_key_of_their_content_alone():
    tokens = np.array([[1, 5, 6, 1, 5, 6, 0, 0], [9, 1, 5, 6, 7, 7, 7, 7]], np.int32)
    numbers = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3, 3]], np.int32)
    found = segments(tokens, numbers)
    assert [segment[:3] for segment in found] == [(0, 0, 3), (0, 3, 3), (1, 0, 1), (1, 1, 3), (1, 4, 4)]
    assert found[0].key == found[1].key == found[3].key
    assert len({segment.key for segment in found}) == 3
    assert segments(tokens[1:, 1:], numbers[1:, 1:])[0].key == found[0].key


def test_what_is_written_is_read_in_any_order_also_by_one_who_opened_before(tmp_path):
    early, writer = ScoreFiles(tmp_path), ScoreFiles(tmp_path)
    all_keys = keys(300)
    for shard in range(3):
        mine = all_keys[100 * shard : 100 * (shard + 1)]
        writer.write(f"shard-{shard}", ((key, key[:5] * (1 + key[0])) for key in mine))
    assert len(early) == 0
    assert early.missing(all_keys[:2]) == [0, 1]
    early.refresh()
    wanted = [all_keys[i] for i in np.random.default_rng(1).permutation(300)]
    assert early.read(wanted) == [key[:5] * (1 + key[0]) for key in wanted]
    assert early.missing([*wanted[:3], b"x" * 16]) == [3]
    with pytest.raises(KeyError):
        early.read([b"x" * 16])
    assert early.size == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_keys_with_the_same_first_half_are_told_apart(tmp_path):
    files = ScoreFiles(tmp_path)
    similar = [b"a" * 8 + bytes([number]) * 8 for number in range(5)]
    files.write("one", ((key, key[-1:]) for key in similar))
    assert files.read(similar[::-1]) == [key[-1:] for key in similar[::-1]]
    assert files.missing([b"a" * 8 + b"z" * 8]) == [0]


@pytest.mark.parametrize("where", [0.3, 0.6, -1])
def test_a_damaged_shard_is_one_line(tmp_path, where):
    files = ScoreFiles(tmp_path)
    files.write("one", ((key, os.urandom(900)) for key in keys(200)))
    path = tmp_path / "one.array_record"
    data = bytearray(path.read_bytes())
    if where < 0:
        path.write_bytes(data[: len(data) // 2])
    else:
        at = int(len(data) * where)
        data[at : at + 40] = bytes(40)
        path.write_bytes(data)
    with pytest.raises(Fault, match=r"one\.array_record are damaged"):
        ScoreFiles(tmp_path).read(keys(200))


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    files = ScoreFiles(tmp_path)

    def content():
        yield keys(1)[0], b"x"
        raise RuntimeError("out of memory on the device")

    with pytest.raises(RuntimeError, match="out of memory"):
        files.write("one", content())
    assert list(tmp_path.iterdir()) == []


def take(directory, queue):
    queue.put([name for name in map(str, range(50)) if Claims(directory).take(name)])


def test_claims_share_the_work_between_processes_and_stale_ones_are_void(tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=take, args=(tmp_path, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = [name for _ in workers for name in queue.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(taken) == sorted(map(str, range(50)))
    mine = Claims(tmp_path)
    assert not mine.take("7")
    monkeypatch.setattr(score_files, "STALE_SECONDS", 0.05)
    time.sleep(0.1)
    assert mine.take("7")
    mine.give_up("7")
    assert not (tmp_path / "claims" / "7").exists()
