"""What the harness stands on: a small disk of its own that can be full, and a library that makes it slow."""

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEGABYTES = 48
SOURCE = Path(__file__).with_name("slow.c")


@dataclass(frozen=True)
class Ground:
    """Where runs lie.

    Attributes:
        folder: for all files of the harness.
        own_disk: whether it is a file system of its own, which can be filled without harm to others.
        slow: the library that makes it slow; None where there is no C compiler.
    """

    folder: Path
    own_disk: bool
    slow: Path | None

    def slowly(self, microseconds: int) -> dict[str, str]:
        """The environment in which each call that touches the folder takes so much longer."""
        slow = {"LD_PRELOAD": str(self.slow), "FAULTS_SLOW_UNDER": str(self.folder)}
        return slow | {"FAULTS_SLOW_MICROSECONDS": str(microseconds)}

    def fill(self) -> None:
        """Take all that is free on the disk, to the last byte."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * size)

    def free(self) -> None:
        """Give it back."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def is_full(self) -> bool:
        """Whether a byte more is refused, by the system itself."""
        try:
            (self.folder / "probe").write_bytes(b"\0" * 4096)
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            (self.folder / "probe").unlink(missing_ok=True)
        return False


@contextlib.contextmanager
def ground(own_disk: bool = True) -> Iterator[Ground]:
    """Mount a tmpfs, where this process may, and compile the library."""
    folder = Path(tempfile.mkdtemp(prefix="epigone-faults-"))
    size = ["-o", f"size={MEGABYTES}m", "epigone-faults"]
    mounted = own_disk and _succeeds(["mount", "-t", "tmpfs", *size, str(folder)])
    try:
        library = folder / "slow.so"
        built = _succeeds(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"])
        yield Ground(folder, mounted, library if built else None)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _succeeds(command: list[str]) -> bool:
    if os.name != "posix" or not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True).returncode == 0
