"""What compiling takes is counted, and a second start reads what the first one compiled."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from epigone.training.compilation import compilation

START = """
from epigone.runtime import prepare
prepare()
import dataclasses, json, jax
from epigone.training.compilation import compilation
with compilation() as found:
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((64, 64))).block_until_ready()
print(json.dumps(dataclasses.asdict(found)))
"""


def test_what_is_compiled_within_counts_and_nothing_else():
    def doubled(x):
        return 2 * x

    x = jnp.ones(7)
    with compilation() as found:
        once = jax.jit(doubled)
        once(x)
        seconds, programs = found.seconds, found.programs
        once(x)
        assert (found.seconds, found.programs) == (seconds, programs)
    assert programs == 1
    assert seconds > 0
    once(jnp.ones(8))
    assert (found.seconds, found.programs) == (seconds, programs)


def test_a_second_start_reads_what_the_first_one_compiled(tmp_path):
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "EPIGONE_", "XDG_"))}
    bare |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    told = [subprocess.run([sys.executable, "-c", START], env=bare, capture_output=True, check=True) for _ in range(2)]
    first, second = (json.loads(one.stdout) for one in told)
    assert first["from_cache"] == 0
    assert second["from_cache"] == second["programs"] == first["programs"] > 0
