"""Checkpoints in a bucket: the files of each writing have a part of their own; the manifest, written last, names it.

So a checkpoint is replaced in one step, and a writer that was given up and still runs disturbs nobody. The manifest has
size and checksum of each object as the store says them, in one listing: nothing is read to seal or to verify. What is
read is compared with checksums of its own (`stored_arrays`).
"""

import random
from pathlib import Path
from typing import Any

from epigone.storage.places import Entry, entries, same, write_whole
from epigone.storage.places import remove as remove_all
from epigone.training.sealed import MANIFEST, Damaged, manifest_text, read_manifest

ASIDE = "damaged.json"
"""What the manifest of a damaged one is called."""


def begin(final: Path) -> int:
    """The number of a new part."""
    return random.SystemRandom().randrange(1, 2**31)


def written(final: Path, number: int) -> Path:
    """Where the files are put."""
    return final / f"{number:08x}"


def sealed(final: Path, manifest: dict[str, Any]) -> Path:
    """Where the files of a sealed one are."""
    return final / str(manifest["part"])


def seal(final: Path, number: int, manifest: dict[str, Any]) -> None:
    """Write the manifest, then remove what it replaced."""
    part = written(final, number).name
    write_whole(final / MANIFEST, manifest_text(manifest | {"part": part, "files": entries(final / part)}))
    for other in {name.partition("/")[0] for name in entries(final) if "/" in name} - {part}:
        remove_all(final / other)


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, if every object is as it says. Raises: Damaged."""
    manifest = read_manifest(directory)
    found = entries(sealed(directory, manifest))
    for name, said in manifest["files"].items():
        if name not in found:
            raise Damaged(f"{name} is missing")
        if not same(Entry(*said), found[name]):
            raise Damaged(f"{name} has another size or checksum than it was written with")
    return manifest


def exists(directory: Path) -> bool:
    """Whether anything is there."""
    return (directory / MANIFEST).exists()


def names(directory: Path) -> list[str]:
    """Names of all that is sealed."""
    split = (name.split("/") for name in entries(directory))
    return [first for first, *rest in split if rest == [MANIFEST]]


def clean(directory: Path) -> None:
    """Remove what killed writers left."""
    found = list(entries(directory))
    kept = {name.partition("/")[0] for name in found if name.endswith((f"/{MANIFEST}", f"/{ASIDE}"))}
    for name in {name.partition("/")[0] for name in found if "/" in name} - kept:
        remove_all(directory / name)


def set_aside(path: Path) -> None:
    """Keep a damaged one, which is none any more."""
    write_whole(path / ASIDE, (path / MANIFEST).read_bytes())
    (path / MANIFEST).unlink()


def remove(path: Path) -> None:
    """Delete one that is sealed; from the first moment it is none any more."""
    (path / MANIFEST).unlink()
    remove_all(path)
