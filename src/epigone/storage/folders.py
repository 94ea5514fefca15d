"""Folders that appear whole in a bucket, and their copies on this disk.

    FOLDER/manifest.json       written last: where the files are, size and SHA-256 of each
    FOLDER/<part>/...          the files

Each writer has a part of its own, so that two who write the same folder at once disturb nobody: the first manifest
counts. What reads local files alone (ArrayRecord, TFDS, safetensors) reads a copy in the cache, which is named by the
content, fetched whole, and compared with its checksums while it is fetched. On a disk a folder is its own copy.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epigone.errors import Fault
from epigone.storage.places import client, entries, failing, on_store, remove, write_new

MANIFEST = "manifest.json"
_BLOCK = 2**22


def cache() -> Path:
    """Where copies lie; whatever is in it can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "epigone" / "stores"


def is_whole(folder: Path) -> bool:
    """Whether all of a folder is there."""
    return (folder / MANIFEST).exists() if on_store(folder) else folder.exists()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """The folder to write what becomes `folder`: itself on a disk, else one on this disk that is uploaded at the end.

    Raises: Fault if it cannot be uploaded.
    """
    if not on_store(folder):
        yield folder
        return
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=cache()) as scratch:
        local = Path(scratch) / folder.name
        yield local
        with failing(folder):
            upload(local, folder)


def upload(local: Path, folder: Path) -> None:
    """Make a folder of this disk appear whole in a bucket, unless another writer was first."""
    paths = {str(path.relative_to(local)): path for path in sorted(local.rglob("*")) if path.is_file()}
    sums = {name: sealed_as(path) for name, path in paths.items()}
    part, files = uuid.uuid4().hex[:12], client(folder)
    files.put([str(path) for path in paths.values()], [str(folder / part / name) for name in paths])
    there = {name: entry.size for name, entry in entries(folder / part).items()}
    if there != {name: size for name, (size, _) in sums.items()}:
        raise Fault(f"{folder} was not uploaded whole: give the same command again")
    if not write_new(folder / MANIFEST, json.dumps({"part": part, "files": sums}, indent=1).encode()):
        remove(folder / part)


def fetched(folder: Path) -> Path:
    """A folder on this disk with the same files.

    Raises: Fault if it is not there whole, or not what was written.
    """
    if not on_store(folder):
        return folder
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        part, sums = manifest["part"], manifest["files"]
    except FileNotFoundError:
        raise Fault(f"nothing finished lies at {folder}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{folder / MANIFEST} is damaged: delete {folder} to make it again") from error
    named = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    local = cache() / named[:32]
    if not local.exists():
        with _appearing(local) as partial:
            _download(folder, part, sums, partial)
    return local


def fetched_file(path: Path, mark: str) -> Path:
    """A copy on this disk of an object that is never changed, `mark` being what its store says of its content."""
    if not on_store(path):
        return path
    named = hashlib.sha256(f"{path} {mark}".encode()).hexdigest()
    local = cache() / f"{named[:32]}{path.suffix}"
    if not local.exists():
        with _appearing(local) as partial:
            client(path).get_file(str(path), str(partial))
    return local


def _download(folder: Path, part: str, sums: dict[str, Any], partial: Path) -> None:
    partial.mkdir()
    for name in sums:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        client(folder).get([str(folder / part / name) for name in sums], [str(partial / name) for name in sums])
    except FileNotFoundError as error:
        raise Fault(f"{folder} is damaged (files are missing): delete it to make it again") from error
    for name, said in sums.items():
        if sealed_as(partial / name) != said:
            raise Fault(f"{folder} is damaged ({name} is not what was written): delete it to make it again")


@contextlib.contextmanager
def _appearing(local: Path) -> Iterator[Path]:
    """A partial copy that gets its name at the end. Of two processes that fetch the same, either's copy is as good."""
    local.parent.mkdir(parents=True, exist_ok=True)
    partial = local.with_name(f".{local.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.partial")
    try:
        yield partial
        with contextlib.suppress(OSError):
            partial.replace(local)
        if not local.exists():
            raise Fault(f"cannot write the copy {local}: is there space?")
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def sealed_as(path: Path) -> list[Any]:
    """Size and SHA-256 of a file on this disk, as manifests have them."""
    return [path.stat().st_size, checksum(path)]


def checksum(path: Path) -> str:
    """SHA-256 of a file on this disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
