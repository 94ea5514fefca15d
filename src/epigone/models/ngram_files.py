"""An n-gram model on disk: one safetensors file with a hash of its own arrays, nothing pickled."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from epigone.errors import Fault, UserError
from epigone.models.counts import Level
from epigone.models.smoothing import Mass

FORMAT = "epigone n-gram 1"
_DTYPES = {
    "context_keys": np.int64,
    "starts": np.int64,
    "tokens": np.int32,
    "weights": np.float64,
    "escape": np.float64,
}


def save(
    path: Path,
    levels: Sequence[Level],
    masses: Sequence[Mass],
    notes: Mapping[str, str],
    written: Sequence[Mass] | None = None,
) -> None:
    """Write levels, masses, those it writes by, and notes to `path`; the file appears whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for k, mass in enumerate(written or ()):
        arrays |= {f"{k}.written.{name}": np.ascontiguousarray(array) for name, array in mass._asdict().items()}
    for k, (level, mass) in enumerate(zip(levels, masses, strict=True)):
        parts = (level.context_keys_C, level.starts, level.tokens_E, mass.weights_E, mass.escape_C)
        for name, array in zip(_DTYPES, parts, strict=True):
            arrays[f"{k}.{name}"] = np.ascontiguousarray(array, dtype=_DTYPES[name])
    header = {
        **notes,
        "format": FORMAT,
        "order": str(len(levels)),
        "vocab_size": str(levels[0].vocab_size),
    }
    header["sha256"] = _hash(arrays, header)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata=header))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(f"{path}: the n-gram model could not be written ({error.strerror or error})") from error


def load(path: Path) -> tuple[tuple[Level, ...], tuple[Mass, ...], dict[str, str], tuple[Mass, ...] | None]:
    """Read what `save` wrote: levels, masses, notes, and the masses that it writes by."""
    if not path.is_file():
        raise UserError(f"{path}: no such n-gram model")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise Fault(f"{path}: not a safetensors file, or a damaged one ({' '.join(str(error).split())})") from error
    if header.get("format") != FORMAT:
        raise Fault(f"{path}: not an n-gram model of this program (format {header.get('format')!r}, not {FORMAT!r})")
    if header.pop("sha256", None) != _hash(arrays, header):
        raise Fault(
            f"{path}: damaged, its content does not match its sha256; train the model again or restore the file"
        )
    order, vocab_size = int(header["order"]), int(header["vocab_size"])
    parts = [[arrays[f"{k}.{name}"] for name in _DTYPES] for k in range(order)]
    levels = tuple(Level(vocab_size, keys, starts, tokens) for keys, starts, tokens, _, _ in parts)
    masses = tuple(Mass(weights, escape) for *_, weights, escape in parts)
    written = [Mass(**{name: arrays[f"{k}.written.{name}"] for name in Mass._fields}) for k in range(order)
               if f"{k}.written.weights_E" in arrays]  # fmt: skip
    return levels, masses, header, tuple(written) or None


def _hash(arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(header.items())).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
