"""What all sealed directories have: a manifest that says what is in them, without which they are none."""

import json
from pathlib import Path
from typing import Any

from epigone.storage.folders import MANIFEST

__all__ = ["MANIFEST", "Damaged", "read_manifest"]


class Damaged(Exception):
    """A checkpoint that is not what its manifest says."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory. Raises: Damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        _ = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"its {MANIFEST} is missing or unreadable") from None
    return dict(manifest)
