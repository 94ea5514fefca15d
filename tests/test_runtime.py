"""Settings of the process: what is not set is set, and what is set stays."""

import os
import platform
import subprocess
import sys

import pytest

BLOCK = """
from epigone.runtime import prepare
prepare()
import ctypes
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
place = malloc(2**26)
heap = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
low, high = (int(end, 16) for end in heap.split()[0].split("-"))
print("kept" if low <= place < high else "mapped anew")
"""
"""Where 64 MB lie: on the heap, of which blocks are used again, or in pages of their own."""

AGAIN = """
from epigone.runtime import prepare
prepare()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
large = libc.malloc(2**30)
above = libc.malloc(2**24)
libc.free(large)
small = [libc.malloc(size) for size in (3000, 50_000, 700_000) for _ in range(50)]
print("used again" if libc.malloc(2**30) == large else "cut")
"""
"""Whether a large block that was given back is whole after small arrays have been made."""

SHOWN = "import os; from epigone.runtime import prepare; prepare(); print(os.environ.get('{}', 'absent'))"


def told(program, **variables):
    """What a program prints in a process where nothing is set but these."""
    ours = ("JAX_", "XLA_", "EPIGONE_", "XDG_", "MALLOC_", "LD_PRELOAD", "OMP_", "OPENBLAS_", "TOKENIZERS_")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=bare | variables, capture_output=True, text=True, check=True).stdout.strip()


def prepared(name, **variables):
    """A variable of the environment in a process that has prepared itself."""
    return told(SHOWN.format(name), **variables)


def test_compilations_are_cached_where_the_user_says(tmp_path):
    assert prepared("JAX_COMPILATION_CACHE_DIR", XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "epigone" / "jax")
    assert prepared("JAX_COMPILATION_CACHE_DIR", JAX_COMPILATION_CACHE_DIR="/mine") == "/mine"
    assert prepared("JAX_COMPILATION_CACHE_DIR", EPIGONE_RUNTIME="off") == "absent"


def test_numpy_has_one_thread_unless_the_user_says_otherwise():
    name = "OPENBLAS_NUM_THREADS"
    assert prepared(name) == "1"
    assert prepared(name, OPENBLAS_NUM_THREADS="4") == "4"
    assert prepared(name, OMP_NUM_THREADS="4") == "absent"
    assert prepared(name, EPIGONE_RUNTIME="off") == "absent"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other settings")
def test_large_blocks_are_kept_unless_the_user_says_otherwise():
    assert told(BLOCK) == "kept"
    assert told(BLOCK, EPIGONE_RUNTIME="off") == "mapped anew"
    assert told(BLOCK, MALLOC_MMAP_MAX_="65536") == "mapped anew"
    assert told(BLOCK, MALLOC_TRIM_THRESHOLD_="131072") == "mapped anew"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other settings")
def test_tokenizers_have_one_thread_where_memory_has_one_arena_unless_the_user_says_otherwise():
    name = "TOKENIZERS_PARALLELISM"
    assert prepared(name) == "false"
    assert prepared(name, TOKENIZERS_PARALLELISM="true") == "true"
    assert prepared(name, MALLOC_MMAP_MAX_="65536") == "absent"
    assert prepared(name, EPIGONE_RUNTIME="off") == "absent"


def test_nothing_that_jax_reads_is_imported_before_it_is_set():
    assert told("import sys, epigone.runtime; print('jax' in sys.modules)") == "False"
    assert told("import sys, epigone.cli; print('jax' in sys.modules)") == "False"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other settings")
def test_small_arrays_do_not_cut_a_large_block_that_was_given_back():
    kept = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35)}
    assert told(AGAIN) == "used again"
    assert told(AGAIN, EPIGONE_RUNTIME="off", **kept) == "cut"


ECHOES = """
import sys
sys.unraisablehook = lambda what: print(type(what.exc_value).__name__, what.exc_value)
from epigone.runtime import prepare
prepare()
class Left:
    def __init__(self, error): self.error = error
    def __del__(self): raise self.error
Left(RuntimeError("Event loop is closed"))
Left(RuntimeError("something else"))
Left(ValueError("Event loop is closed"))
"""


def test_only_the_echoes_of_an_error_are_kept_quiet():
    assert told(ECHOES).splitlines() == ["RuntimeError something else", "ValueError Event loop is closed"]
