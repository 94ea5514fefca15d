"""Documents in files, on a disk or in a bucket: paragraphs of .txt, lines of .jsonl, rows of .parquet."""

import fnmatch
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from epigone.errors import UserError
from epigone.storage.folders import cache, fetched_file
from epigone.storage.places import entries, reached


def find(pattern: str) -> list[Path]:
    """Files that match the glob pattern, sorted. Raises UserError if there is none, or one of another kind."""
    paths = _fetched(pattern) if "://" in pattern else _on_disk(pattern)
    if not paths:
        raise UserError(f"no file matches '{pattern}'")
    for path in paths:
        if path.suffix not in _READERS:
            raise UserError(f"{path}: cannot read '{path.suffix}' files; known are {', '.join(_READERS)}")
    return paths


def _on_disk(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    return [path for path in paths if path.is_file()]


def _fetched(pattern: str) -> list[Path]:
    """Copies of the objects of a bucket that match."""
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    folder, rest = reached(fixed), pattern[len(fixed) + 1 :]
    deep = "**" in rest
    names = {name: entry.mark for name, entry in entries(folder).items() if deep or name.count("/") == rest.count("/")}
    wanted = [name for name in names if fnmatch.fnmatchcase(name, rest.replace("**/", "*"))]
    return [fetched_file(folder / name, names[name]) for name in wanted]


def fingerprint(paths: list[Path], *settings: object) -> str:
    """Changes when a file is added, removed, resized or touched, or when a setting changes."""
    # A copy is named by place and content, on every host alike.
    states = [
        (path.name, path.stat().st_size)
        if path.parent == cache()
        else (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
    ]
    return hashlib.sha256(json.dumps([states, settings]).encode()).hexdigest()[:12]


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def read(path: Path, field: str) -> Iterator[str]:
    """Documents of one file, without those that are only white space. Raises UserError with file and line."""
    try:
        for where, text in _READERS[path.suffix](path, field):
            if not isinstance(text, str):
                raise UserError(f"{path}, {where}: field '{field}' is {type(text).__name__}, not text")
            _check_characters(text, path, where)
            if stripped := text.strip():
                yield stripped
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} cannot be decoded; convert the file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _check_characters(text: str, path: Path, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, {where}: half a character (a lone surrogate) at {error.start}") from error


def _paragraphs(path: Path, _: str) -> Iterator[tuple[str, object]]:
    lines: list[str] = []
    first = 1
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                first = first if lines else number
                lines.append(line)
            elif lines:
                yield f"line {first}", "".join(lines)
                lines = []
    if lines:
        yield f"line {first}", "".join(lines)


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or field not in row:
                found = f"; it has {', '.join(map(repr, row))}" if isinstance(row, dict) else ""
                raise UserError(f"{path}, line {number}: no field '{field}'{found}")
            yield f"line {number}", row[field]


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise UserError(f"{path}: no column '{field}'; it has {', '.join(map(repr, file.schema_arrow.names))}")
        number = 0
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield f"row {number}", text
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error


_READERS = {".txt": _paragraphs, ".jsonl": _json_lines, ".parquet": _parquet_rows}
