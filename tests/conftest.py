"""Every test process sees eight virtual CPU devices and shares one compilation cache on disk."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest
from compiler_flags import QUICK
from object_stores import folder, s3_folder, stores  # noqa: F401

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
for library in ("OMP", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")  # in small products threads wait for each other, turning
hypothesis.settings.register_profile("loaded", deadline=None)  # others may use the machine
hypothesis.settings.load_profile("loaded")
gc.set_threshold(200_000, 50, 100)  # tracing makes many objects that stay: Python's own thresholds cost a tenth of it

LONG = ("readme", "smollm2_student", "same_losses", "on_policy", "faults", "cached_scores", "cli", "configs")
"""Files of tests/test_*.py that take a minute or more: they are begun with, so that no worker is alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, otherwise in the order in which they were found."""
    long = {f"test_{name}.py" for name in LONG}
    items.sort(key=lambda item: not (item.path.name in long and item.path.parent.name == "tests"))


MAPS = Path("/proc/self/maps")
MANY = 20_000
"""Linux gives a process 65,530 mapped regions. Compiled programs take some each; XLA dies where there is none left."""


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs():
    """Forget compiled programs between two files, where they have become many; the cache on disk has them still."""
    yield
    if "jax" in sys.modules and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        sys.modules["jax"].clear_caches()
        gc.collect()
