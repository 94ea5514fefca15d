"""Settings of the process: what is not set is set, and what is set stays."""

import os
import subprocess
import sys

SHOWN = "import os; from epigone.runtime import prepare; prepare(); print(os.environ.get('{}', 'absent'))"


def prepared(name, **variables):
    """A variable of the environment in a process that has prepared itself."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "EPIGONE_", "XDG_"))}
    command = [sys.executable, "-c", SHOWN.format(name)]
    return subprocess.run(command, env=bare | variables, capture_output=True, text=True, check=True).stdout.strip()


def test_compilations_are_cached_where_the_user_says(tmp_path):
    assert prepared("JAX_COMPILATION_CACHE_DIR", XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "epigone" / "jax")
    assert prepared("JAX_COMPILATION_CACHE_DIR", JAX_COMPILATION_CACHE_DIR="/mine") == "/mine"
    assert prepared("JAX_COMPILATION_CACHE_DIR", EPIGONE_RUNTIME="off") == "absent"
