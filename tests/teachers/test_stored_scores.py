"""Kept scores in a bucket: written by one host, found by another, and shared work is claimed."""

import pytest
from object_stores import trouble

from epigone.errors import Fault
from epigone.storage import claims
from epigone.storage.places import entries, write_whole
from epigone.teachers.score_files import Claims, ScoreFiles


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "epigone" / "stores"


def key(number):
    return number.to_bytes(16, "little")


def test_what_one_host_wrote_another_finds(folder, cached):
    mine, theirs = ScoreFiles(folder), ScoreFiles(folder)
    mine.write("a", [(key(1), b"one"), (key(2), b"two")])
    mine.write("b", [(key(3), b"three")])
    assert theirs.missing([key(1), key(3)]) == [0, 1]
    theirs.refresh()
    assert theirs.read([key(3), key(1)]) == [b"three", b"one"]
    assert (len(theirs), theirs.size) == (3, sum(entry.size for entry in entries(folder).values()))
    with trouble() as met:
        theirs.refresh()
    assert len(met.requests) == 1, "one listing; what is there is not fetched again"
    assert not [path for path in cached.iterdir() if path.name.endswith(".partial")]


def test_a_damaged_shard_is_told(s3_folder):
    ScoreFiles(s3_folder).write("a", [(key(1), b"one")])
    write_whole(s3_folder / "a.array_record", b"nothing of this kind")
    with pytest.raises(Fault, match="are damaged"):
        ScoreFiles(s3_folder)


def test_work_is_claimed_and_given_up(folder, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    mine, theirs = Claims(folder), Claims(folder)
    assert mine.take("piece")
    assert not theirs.take("piece")
    mine.renew("piece")
    mine.give_up("piece")
    assert theirs.take("piece")
    theirs.give_up("piece")
    assert entries(folder) == {}
