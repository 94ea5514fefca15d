"""`epigone serve` in a process of its own."""

import re
import subprocess
import sys


def start(run, *arguments, node="teacher@0"):
    """The command, and where it answers."""
    command = [sys.executable, "-m", "epigone", "serve", node, "--run", str(run), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
    assert found, line + process.stderr.read()
    return process, found[0]
