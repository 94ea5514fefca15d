"""Places in buckets: their names, what they hold, and every bad one in a line."""

import sys
from pathlib import Path

import pytest
from object_stores import BUCKET, trouble

from epigone.errors import Fault, UserError
from epigone.storage import places
from epigone.storage.places import entries, place, reach, relative, remove, resolve, write_new, write_whole
from epigone.storage.reasons import explained


def test_a_place_on_a_disk_is_a_path(tmp_path):
    assert place("runs/x") == Path("runs/x")
    assert type(place(tmp_path)) is type(Path())
    assert not places.on_store(place("gs:/x"))


@pytest.mark.parametrize("text", ["s3://bu/runs/x", "gs://bu/runs/x/", "s3://bu//runs/./x"])
def test_a_place_in_a_bucket_has_the_names_of_a_path(text):
    path = place(text)
    assert places.on_store(path)
    assert str(path) == f"{text[:2]}://bu/runs/x"
    assert (path.name, str(path.parent), str(path / "a" / "b.json")) == (
        "x",
        f"{text[:2]}://bu/runs",
        f"{path}/a/b.json",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket", r"'s3://bucket' names no folder in a bucket: give s3://BUCKET/FOLDER"),
        ("gs:///x", "names no folder in a bucket"),
        ("gs://../x", "names no folder in a bucket"),
        ("http://a/b", "no store is known by 'http://'; give a folder on a disk, or gs://BUCKET/FOLDER, s3://"),
    ],
)
def test_what_names_no_place_is_told(text, message):
    with pytest.raises(UserError, match=message):
        place(text)


def test_a_package_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'gs://bu/x' needs the package gcsfs: pip install 'epigone\[stores\]'"):
        place("gs://bu/x")


def test_what_is_written_is_there_whole_and_can_be_listed_and_removed(folder):
    path = folder / "nodes" / "a" / "record.json"
    assert not path.exists()
    for content in (b"{}", b"[1]"):
        write_whole(path, content)
        assert path.read_bytes() == content
    write_whole(folder / "lineage.json", b"x" * 3000)
    assert {name: entry.size for name, entry in entries(folder).items()} == {
        "lineage.json": 3000,
        "nodes/a/record.json": 3,
    }
    assert [str(p) for p in folder.glob("nodes/*/record.json")] == [str(path)]
    remove(folder / "nodes")
    remove(folder / "nodes")
    assert list(entries(folder)) == ["lineage.json"]
    assert entries(folder / "line") == {}


def test_another_content_has_another_mark(folder):
    marks = []
    for content in (b"a", b"b", b"a"):
        write_whole(folder / "x", content)
        marks.append(entries(folder)["x"].mark)
    assert marks[0] == marks[2] != marks[1]


def test_of_two_writers_of_a_new_object_one_wins(folder):
    assert [write_new(folder / "x", content) for content in (b"a", b"b")] == [True, False]
    assert (folder / "x").read_bytes() == b"a"


def test_names_from_one_place_to_another(tmp_path):
    run = place("s3://bu/runs/x")
    for other in ("s3://bu/runs/data/m", "s3://co/data/m", "gs://bu/data/m", str(tmp_path / "m")):
        named = relative(place(other), run)
        assert str(resolve(run, named)) == other
    assert relative(place("s3://bu/runs/data/m"), run) == "../data/m"
    local = tmp_path / "runs" / "x"
    for other in (tmp_path / "data", place("gs://bu/data/m")):
        found = resolve(local, relative(other, local))
        assert str(found) == str(other) or found.resolve() == other.resolve()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there_is_told(stores, scheme):
    with pytest.raises(UserError, match=f"there is no bucket 'absent' in {scheme}://: make it first"):
        reach(place(f"{scheme}://absent/runs/x"))
    reach(place(f"{scheme}://{BUCKET}/runs/x"))


def test_a_bucket_that_is_closed_is_told(folder):
    with (
        trouble(failing=1.0, status=403),
        pytest.raises(UserError, match=r"no permission for (s3|gs)://bucket: ask for"),
    ):
        reach(folder)


def test_a_write_that_is_refused_is_a_fault(folder):
    with trouble(failing=1.0, status=403), pytest.raises(Fault, match="no permission"), places.failing(folder):
        write_whole(folder / "x", b"x")


def test_missing_credentials_and_networks_are_told():
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError
    from google.auth.exceptions import DefaultCredentialsError

    path = place("s3://bu/x")
    assert "no credentials for s3://bu: sign in first (aws configure" in explained(NoCredentialsError(), path)
    assert "gcloud auth" in explained(DefaultCredentialsError("none"), place("gs://bu/x"))
    lost = EndpointConnectionError(endpoint_url="http://x")
    assert "s3://bu cannot be reached: is there a network" in explained(lost, path)
    assert "cannot be reached" in explained(lost)
    assert explained(KeyError("x")) is None


def test_a_store_that_is_slow_and_busy_is_asked_again(folder):
    with trouble(latency=0.002, failing=0.08) as met:
        for number in range(6):
            write_whole(folder / f"{number}", b"%d" % number)
        assert [(folder / f"{number}").read_bytes() for number in range(6)] == [b"%d" % n for n in range(6)]
    assert met.failed > 0
