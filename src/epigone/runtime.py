"""Settings of the process that make it fast, in one place: before JAX starts, and never against what the user set.

EPIGONE_RUNTIME=off turns all of them off.
"""

import ctypes
import logging
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEEP = 2**31 - 1


def prepare() -> None:
    """Set what is not set: compilations are cached on disk, and large blocks of memory are used again.

    A training step on a CPU takes and gives back arrays of many megabytes. By default the allocator maps each one anew,
    and the system fills every page with zeros first, which costs more than the arithmetic on it. Kept blocks cost none.
    """
    if os.environ.get("EPIGONE_RUNTIME") == "off":
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "epigone" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax logs the traceback of what it also raises; the command line tells that in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if sys.platform == "linux" and not {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"} & set(os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, _KEEP)
