"""Which programs JAX compiles, by name.

`_cache_size` of a jitted function does not say: the caches of a process share one list, whose count goes wrong where
some are cleared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def compiled_names() -> Iterator[list[str]]:
    """Names of the jitted functions that are compiled, or read from the cache on the disk, while the block runs."""
    names: list[str] = []

    def lasted(event: str, _seconds: float, fun_name: str = "", **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(lasted)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(lasted)
