"""Folders in buckets: whole or not there, fetched once, compared with what was written."""

import json

import pytest
from object_stores import trouble

from epigone.errors import Fault
from epigone.storage import folders
from epigone.storage.folders import fetched, fetched_file, is_whole, upload, writing
from epigone.storage.places import entries, write_whole

FILES = {"card.json": b"{}", "data/part-0": b"x" * 5000, "data/part-1": b""}


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "epigone" / "stores"


def fill(local, files=FILES):
    for name, content in files.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(content)


def content(local):
    return {str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()}


def test_on_a_disk_a_folder_is_its_own_copy(tmp_path):
    with writing(tmp_path / "x") as local:
        assert local == tmp_path / "x"
        assert not is_whole(tmp_path / "x")
        fill(local)
    assert is_whole(tmp_path / "x")
    assert fetched(tmp_path / "x") == tmp_path / "x"


def test_a_folder_comes_back_as_it_was_and_is_fetched_once(folder, cached):
    with writing(folder) as local:
        fill(local)
        assert not is_whole(folder)
    assert is_whole(folder)
    copy = fetched(folder)
    assert content(copy) == FILES
    assert [path.name for path in cached.iterdir()] == [copy.name], "nothing half done is left"
    with trouble() as met:
        assert fetched(folder) == copy
    assert not any("part-0" in request for request in met.requests)


def test_the_same_content_elsewhere_is_the_same_copy(folder):
    for name in ("a", "b"):
        with writing(folder / name) as local:
            fill(local)
    assert fetched(folder / "a") == fetched(folder / "b")


def test_a_writer_that_fails_leaves_nothing_that_counts(folder, cached):
    def fail():
        with writing(folder) as local:
            fill(local)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not is_whole(folder)
    assert list(cached.iterdir()) == []
    with pytest.raises(Fault, match="nothing finished lies at"):
        fetched(folder)


def test_of_two_writers_the_first_counts_and_the_other_leaves_nothing(folder, tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "two", {"card.json": b"[]"})
    upload(tmp_path / "one", folder)
    upload(tmp_path / "two", folder)
    assert content(fetched(folder)) == FILES
    assert len({name.partition("/")[0] for name in entries(folder)}) == 2


@pytest.mark.parametrize("how", ["flipped", "short", "missing", "manifest"])
def test_damage_is_told_and_leaves_no_copy(s3_folder, cached, how):
    with writing(s3_folder) as local:
        fill(local)
    name = next(name for name in entries(s3_folder) if name.endswith("part-0"))
    if how == "missing":
        (s3_folder / name).unlink()
    elif how == "manifest":
        write_whole(s3_folder / "manifest.json", b"{")
    else:
        write_whole(s3_folder / name, b"y" + b"x" * (4999 if how == "flipped" else 10))
    with pytest.raises(Fault, match=r"is damaged.*: delete .* to make it again"):
        fetched(s3_folder)
    assert not cached.exists() or list(cached.iterdir()) == []


def test_a_folder_that_cannot_be_uploaded_is_a_fault(folder):
    with trouble(failing=1.0, status=403), pytest.raises(Fault, match="no permission"), writing(folder) as local:
        fill(local)
    assert not is_whole(folder)


def test_a_single_object_is_fetched_once(folder):
    write_whole(folder / "x.bin", b"abc")
    mark = entries(folder)["x.bin"].mark
    copy = fetched_file(folder / "x.bin", mark)
    assert (copy.read_bytes(), copy.suffix) == (b"abc", ".bin")
    with trouble() as met:
        assert fetched_file(folder / "x.bin", mark) == copy
    assert met.requests == []


def test_the_manifest_says_what_is_in_it(folder):
    with writing(folder) as local:
        fill(local)
    said = json.loads((folder / "manifest.json").read_text())["files"]
    assert said["data/part-0"] == [5000, folders.checksum(fetched(folder) / "data" / "part-0")]
