"""Settings of the process that make it fast, in one place: before JAX starts, and never against what the user set.

EPIGONE_RUNTIME=off turns all of them off.
"""

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1

_BLOCK, _BLOCKS = 2**20, 512
"""Bytes of a free block for what is small, and how many of them there are; memory that is not written takes none."""


def prepare() -> None:
    """Set what is not set: compilations are cached, large blocks are used again, NumPy and tokenizers have one thread.

    A training step on a CPU takes and gives back arrays of many megabytes. By default the allocator maps each one anew,
    and the system fills every page with zeros first, which costs more than the arithmetic on it. Kept blocks cost none.
    """
    if os.environ.get("EPIGONE_RUNTIME") == "off":
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "epigone" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & set(os.environ):
        # NumPy's products are small here: its threads would wait for the next one by turning in circles.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # Orbax logs the traceback of what it also raises; the command line tells that in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_echoes(sys.unraisablehook)
    if sys.platform == "linux" and not {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"} & set(os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            # Tokenizers give every token a block of its own: their threads would wait for each other.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            mallopt(_M_ARENA_MAX, 1)
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, _NEVER)
            _free_blocks()


def _without_echoes(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """`hook`, but not for what follows from an error that was told.

    When one write of many has failed, the others, in threads of C++, find that nobody waits for them any more.
    """

    def shown(what: Any) -> None:
        if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
            hook(what)

    return shown


@cache
def _free_blocks() -> None:
    """Free blocks between blocks that stay, once in a process: small arrays are put there.

    The allocator takes the smallest free block that is large enough. Where there is no other, it cuts a piece from the
    gigabyte that a step has just given back, which is then too small for the next step: the process would grow by one
    such block after the other.
    """
    libc = ctypes.CDLL(None)
    malloc, free = libc.malloc, libc.free
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    blocks = [malloc(_BLOCK) for _ in range(2 * _BLOCKS)]
    for block in blocks[::2]:
        free(block)
