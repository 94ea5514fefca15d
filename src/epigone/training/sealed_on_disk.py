"""Checkpoints on a disk: written under a hidden name, and renamed when their manifest is there."""

import os
import shutil
from pathlib import Path
from typing import Any

from epigone.storage.folders import sealed_as
from epigone.training.sealed import MANIFEST, Damaged, manifest_text, read_manifest


def begin(final: Path) -> int:
    """Make room for what becomes `final`."""
    hidden = written(final, 0)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return 0


def written(final: Path, _: int) -> Path:
    """Where the files are put."""
    return final.with_name(f".{final.name}.tmp")


def sealed(final: Path, _: dict[str, Any]) -> Path:
    """Where the files of a sealed one are."""
    return final


def seal(final: Path, number: int, manifest: dict[str, Any]) -> None:
    """Write the manifest, and give the directory its name in one step."""
    hidden = written(final, number)
    files = {str(p.relative_to(hidden)): sealed_as(p) for p in sorted(hidden.rglob("*")) if p.is_file()}
    with (hidden / MANIFEST).open("wb") as file:
        file.write(manifest_text(manifest | {"files": files}))
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        old = final.with_name(f".{final.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        hidden.rename(final)
        shutil.rmtree(old)
    else:
        hidden.rename(final)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, if every file is as it says. Raises: Damaged."""
    manifest = read_manifest(directory)
    for name, said in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if sealed_as(path) != said:
            raise Damaged(f"{name} has another size or checksum than it was written with")
    return manifest


def exists(directory: Path) -> bool:
    """Whether anything is there."""
    return directory.is_dir()


def names(directory: Path) -> list[str]:
    """Names of all that is sealed."""
    return [path.name for path in directory.glob("step_*")]


def clean(directory: Path) -> None:
    """Remove what killed writers left."""
    for leftover in directory.glob(".*.tmp"):
        shutil.rmtree(leftover)


def set_aside(path: Path) -> None:
    """Keep a damaged one under another name."""
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def remove(path: Path) -> None:
    """Delete one that is sealed."""
    shutil.rmtree(path)
