"""What all sealed directories have: a manifest that says what is in them, without which they are none.

It is two lines: JSON, and the SHA-256 of that. So a bit that flips in the manifest itself is noticed too.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from epigone.storage.folders import MANIFEST

__all__ = ["MANIFEST", "Damaged", "manifest_text", "read_manifest"]


class Damaged(Exception):
    """A checkpoint that is not what its manifest says."""


def manifest_text(manifest: dict[str, Any]) -> bytes:
    """What is written as a manifest."""
    said = json.dumps(manifest).encode()
    return said + b"\n" + _checksum(said) + b"\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory. Raises: Damaged."""
    try:
        said, checksum, rest = (directory / MANIFEST).read_bytes().split(b"\n")
        if checksum != _checksum(said) or rest:
            raise ValueError
        manifest = json.loads(said)
        _ = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"its {MANIFEST} is missing or unreadable") from None
    return dict(manifest)


def _checksum(said: bytes) -> bytes:
    return hashlib.sha256(said).hexdigest().encode()
