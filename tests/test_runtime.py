"""Settings of the process: what is not set is set, and what is set stays."""

import os
import subprocess
import sys

import pytest

SHOWN = "import os; from epigone.runtime import prepare; prepare(); print(os.environ.get('{}', 'absent'))"
ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"
VIRTUAL = "--xla_force_host_platform_device_count=2"


def prepared(name, **variables):
    """A variable of the environment in a process that has prepared itself."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "EPIGONE_", "XDG_"))}
    command = [sys.executable, "-c", SHOWN.format(name)]
    return subprocess.run(command, env=bare | variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, "absent"),
        ({"XLA_FLAGS": VIRTUAL}, f"{VIRTUAL} {ORDER}=false"),
        ({"JAX_NUM_PROCESSES": "2"}, f"{ORDER}=false"),
        ({"XLA_FLAGS": f"{ORDER}=true {VIRTUAL}"}, f"{ORDER}=true {VIRTUAL}"),
        ({"XLA_FLAGS": VIRTUAL, "EPIGONE_RUNTIME": "off"}, VIRTUAL),
    ],
    ids=["one device", "virtual devices", "processes", "said otherwise", "off"],
)
def test_devices_of_one_processor_wait_for_each_other_in_one_order(variables, flags):
    assert prepared("XLA_FLAGS", **variables) == flags


def test_compilations_are_cached_where_the_user_says(tmp_path):
    assert prepared("JAX_COMPILATION_CACHE_DIR", XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "epigone" / "jax")
    assert prepared("JAX_COMPILATION_CACHE_DIR", JAX_COMPILATION_CACHE_DIR="/mine") == "/mine"
    assert prepared("JAX_COMPILATION_CACHE_DIR", EPIGONE_RUNTIME="off") == "absent"
