"""Where files lie: on a disk, or in a bucket of an object store, as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.

A place on a disk is a `pathlib.Path`. One in a bucket is an `etils.epath.Path`, which has the same methods for names
and for reading, over fsspec (gcsfs, s3fs). A bucket has no folders, no rename and no append: an object appears whole
when it is written and replaces the one before, and whatever is made of several objects is whole when its manifest,
written last, is there. Requests that fail in passing (503, 429, a lost connection) are made again by these libraries,
with longer and longer pauses.
"""

import contextlib
import functools
import importlib.util
import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, cast

from epigone.errors import Fault, UserError
from epigone.storage.reasons import explained, first_line

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
"""Object stores, and the package that reaches each."""

RETRIES = 10
"""How often s3fs makes a request again: after 0.1 s, then 1.7 times as long each time, about half a minute in all."""


class Entry(NamedTuple):
    """What a store says of an object.

    Attributes:
        size: bytes.
        mark: the store's own checksum of the content, 'crc32c ...' or 'etag ...'.
    """

    size: int
    mark: str


def place(text: str | os.PathLike[str]) -> Path:
    """The place that a text names. Raises UserError for a store or a package that is not there."""
    scheme, mark, rest = str(text).partition("://")
    if not mark:
        return Path(text)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://BUCKET/FOLDER" for name in SCHEMES)
        raise UserError(f"'{text}': no store is known by '{scheme}://'; give a folder on a disk, or {known}")
    bucket, _, inside = rest.partition("/")
    inside = posixpath.normpath(inside.strip("/") or ".")
    if not re.fullmatch(r"\w[\w.-]+", bucket) or inside.startswith("."):
        raise UserError(f"'{text}' names no folder in a bucket: give {scheme}://BUCKET/FOLDER")
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise UserError(f"'{text}' needs the package {SCHEMES[scheme]}: pip install 'epigone[stores]'")
    return _store_path(f"{scheme}://{bucket}/{inside}")


def _store_path(text: str) -> Path:
    # TensorFlow has clients of its own, which epath would prefer: one client, with one set of credentials and retries.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath

    return cast(Path, epath.Path(text))


def on_store(path: Path) -> bool:
    """Whether a place is in a bucket."""
    return not isinstance(path, Path)


def parts(path: Path) -> tuple[str, str, str]:
    """Scheme, bucket and key of a place in a bucket."""
    scheme, _, rest = str(path).partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


@functools.cache
def filesystem(scheme: str) -> Any:
    """The client of a store, which epath uses too.

    It remembers no listing, since other hosts write beside this one. FSSPEC_S3_..., FSSPEC_GS_... and the variables and
    files of the providers say where it is and who asks.
    """
    import fsspec
    from etils.epath import backend

    for name in ("gcs", "gs") if scheme == "gs" else ("s3", "s3a"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    files = backend.fsspec_backend.fs(f"{scheme}://")
    if scheme == "s3":
        files.retries = RETRIES
    return files


def client(path: Path) -> Any:
    """The client of the store in which a place is."""
    return filesystem(parts(path)[0])


def reached(text: str) -> Path:
    """The place that a user gave, once its store has answered. Raises UserError."""
    path = place(text)
    reach(path)
    return path


def reach(path: Path) -> None:
    """Ask a store once for a place. Raises UserError for a bucket that is not there, closed, or out of reach."""
    if not on_store(path):
        return
    scheme, bucket, key = parts(path)
    files = client(path)
    try:
        if scheme == "s3":
            files.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/", MaxKeys=1)
        else:
            files.call("GET", "b/{}/o", bucket, prefix=f"{key}/", maxResults=1, json_out=True)
    except Exception as error:  # each client has errors of its own
        raise UserError(explained(error, path) or f"cannot read {path}: {first_line(error)}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a run killed at any moment, sees the old one or the new one, never a part."""
    if on_store(path):
        client(path).pipe_file(str(path), content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def put_file(local: Path, path: Path) -> None:
    """Give a file of this disk its place, where it appears whole: it is moved on a disk, and sent to a bucket."""
    if on_store(path):
        client(path).put_file(str(local), str(path))
    else:
        local.replace(path)


def write_new(path: Path, content: bytes) -> bool:
    """Write an object that is not there yet, if it is not: of several writers one gets True."""
    store = key_value_store(path.parent)
    missing = store.read(path.name).result()
    if missing.state != "missing":
        return False
    store.write(path.name, content, if_equal=missing.stamp.generation).result()
    # What counts is what lies there: a write that was made again after a lost answer meets its own first try.
    return bool(store.read(path.name).result().value == content)


def entries(folder: Path) -> dict[str, Entry]:
    """All objects below a place in a bucket, by their names from there, in one listing."""
    base = f"{parts(folder)[1]}/{parts(folder)[2]}/"
    found = client(folder).find(str(folder), detail=True)
    return {name.removeprefix(base): _entry(info) for name, info in sorted(found.items()) if name.startswith(base)}


def _entry(info: dict[str, Any]) -> Entry:
    crc32c = info.get("crc32c")
    mark = f"crc32c {crc32c}" if crc32c else f"etag {str(info.get('ETag') or info.get('etag')).strip(chr(34))}"
    return Entry(int(info["size"]), mark)


def same(sealed: Entry, found: Entry) -> bool:
    """Whether an object is what it was. Marks of several kinds, and of uploads in several requests, tell nothing."""
    kinds = {entry.mark.partition(" ")[0] for entry in (sealed, found)}
    told = len(kinds) == 1 and "-" not in sealed.mark + found.mark
    return sealed.size == found.size and (sealed.mark == found.mark or not told)


def remove(folder: Path) -> None:
    """Delete a folder and all that is in it, if it is there."""
    if not on_store(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        client(folder).rm(str(folder), recursive=True)


def relative(path: Path, start: Path) -> str:
    """A name from which `resolve` finds a place again, from a folder: relative on one disk, or in one bucket."""
    if on_store(path) != on_store(start) or (on_store(path) and parts(path)[:2] != parts(start)[:2]):
        return str(path if on_store(path) else path.absolute())
    return os.path.relpath(path, start)


def resolve(start: Path, name: str) -> Path:
    """The place of a name that `relative` gave."""
    if "://" in name:
        return place(name)
    if not on_store(start) or os.path.isabs(name):
        return Path(os.path.normpath(Path(start) / name if not on_store(start) else name))
    scheme, bucket, key = parts(start)
    return place(f"{scheme}://{bucket}/{posixpath.normpath(posixpath.join(key, name))}")


def key_value_store(folder: Path) -> Any:
    """The folder as a tensorstore KvStore: for conditional writes, and for arrays."""
    import tensorstore as ts

    return ts.KvStore.open(key_value_spec(folder), context=context()).result()


def key_value_spec(folder: Path) -> dict[str, Any]:
    """How tensorstore finds a folder, with the endpoint, region and credentials of the other client."""
    if not on_store(folder):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    scheme, bucket, key = parts(folder)
    spec: dict[str, Any] = {"bucket": bucket, "path": f"{key}/"}
    if scheme == "gs":
        return {"driver": "gcs", **spec}
    endpoint, region = _s3_endpoint()
    spec |= {"endpoint": endpoint} if "amazonaws.com" not in endpoint else {}
    spec |= {"aws_region": region} if region and region != "aws-global" else {}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return {"driver": "s3", **spec}


@functools.cache
def _s3_endpoint() -> tuple[str, str]:
    files = filesystem("s3")
    files.connect()
    return files.s3.meta.endpoint_url, files.s3.meta.region_name


@functools.cache
def context() -> Any:
    """How tensorstore makes requests again."""
    import tensorstore as ts

    retries = {"max_retries": 32, "initial_delay": "200ms", "max_delay": "32s"}
    return ts.Context({"s3_request_retries": retries, "gcs_request_retries": retries})


def failing(path: Path) -> contextlib.AbstractContextManager[None]:
    """What fails inside, when a place is written, becomes a Fault of one line."""
    return _Failing(path)


class _Failing(contextlib.AbstractContextManager[None]):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError | Fault):
            raise Fault(explained(error, self._path) or f"could not write {self._path}: {first_line(error)}") from error
