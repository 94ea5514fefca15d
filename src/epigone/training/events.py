"""Event files of TensorBoard: records of a length, a protocol buffer, and a CRC-32C of each (tensorflow/core/lib/io).

Written without a buffer or a thread of another library: points are few, and a disk that is full is then an error of the
point that finds it so, once, and not also of whatever lets go of the file later.
"""

import errno
import functools
import os
import platform
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from epigone.storage.places import on_store, write_whole


class Events:
    """Event files of one run; made at the first point, by the first process alone."""

    def __init__(self, directory: Path, active: bool) -> None:
        self._directory, self._active = directory, active
        self._file: Any = None
        # An event file grows, and an object does not: it is written here, and brought there as a whole.
        self._scratch = (
            tempfile.TemporaryDirectory(prefix="epigone-events-") if on_store(directory) and active else None
        )

    def write(self, point: Mapping[str, float]) -> None:
        """Write all metrics of a point of the curve. Raises: OSError."""
        if not self._active:
            return
        if self._file is None:
            self._begin(Path(self._scratch.name) if self._scratch else self._directory, int(point["step"]))
        values = [{"tag": name, "simple_value": float(value)} for name, value in point.items() if name != "step"]
        self._append(step=int(point["step"]), summary={"value": values})

    def close(self) -> None:
        """Bring all to the disk, or to the bucket."""
        if self._file is not None:
            self.bring()
            self._file.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def bring(self) -> None:
        """Bring what there is to the bucket, so that a run that is killed loses no more than with its checkpoint."""
        if self._file is None or self._scratch is None:
            return
        for path in Path(self._scratch.name).iterdir():
            write_whole(self._directory / path.name, path.read_bytes())

    def _begin(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self._file = (directory / name).open("ab", buffering=0)
        # Points behind the checkpoint from which a run goes on were written before it was killed: a start voids them.
        self._append(step=step, file_version="brain.Event:2")
        self._append(step=step, session_log={"status": "START"})

    def _append(self, **said: Any) -> None:
        event, checksum = _format()
        record = _record(event(wall_time=time.time(), **said).SerializeToString(), checksum)
        if self._file.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)


@functools.cache
def _format() -> tuple[Any, Callable[[bytes], int]]:
    """tensorboardX's message and its masked checksum.

    It imports PyTorch where that is installed, for seconds, and for what is not used here: it shall find none.
    """
    hidden: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c
    finally:
        for name in hidden:
            del sys.modules[name]
    return Event, masked_crc32c


def _record(data: bytes, checksum: Callable[[bytes], int]) -> bytes:
    """One record: its length as 8 bytes, data, and masked checksums of both."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", checksum(length)) + data + struct.pack("<I", checksum(data))
