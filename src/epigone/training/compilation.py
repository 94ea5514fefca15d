"""What compiling takes: seconds and programs, and how many of these a cache on the disk had (see `runtime.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"


@dataclass
class Compilation:
    """What was compiled so far.

    Attributes:
        seconds: of lowering and compiling, or reading what was compiled before; not of tracing.
        programs: how many.
        from_cache: those of them that the cache had. Small programs are compiled faster than they are read, and are not
            kept.
    """

    seconds: float = 0.0
    programs: int = 0
    from_cache: int = 0


@contextmanager
def compilation() -> Iterator[Compilation]:
    """Counts what JAX compiles in this process while the block runs, in all threads."""
    found = Compilation()

    def lasted(event: str, duration_secs: float, **_: Any) -> None:
        if event in (_LOWERED, _COMPILED):
            found.seconds += duration_secs
            found.programs += event == _COMPILED

    def happened(event: str, **_: Any) -> None:
        found.from_cache += event == _READ

    jax.monitoring.register_event_duration_secs_listener(lasted)
    jax.monitoring.register_event_listener(happened)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(lasted)
        jax.monitoring.unregister_event_listener(happened)
