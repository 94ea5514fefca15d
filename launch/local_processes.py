#!/usr/bin/env python3
"""Start one command as N processes on this machine that form one JAX program.

    python launch/local_processes.py --processes 2 -- epigone run configs/quickstart.py --hardware.data 2

Every process gets the coordinator's address, the number of processes and its own number in the environment variables
that JAX reads; no hyper-parameter is set here. Output lines carry the number of their process. The first process that
fails ends the others, and its exit code is this program's. SIGTERM and SIGINT are passed on.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading

TELL_SECONDS, GRACE_SECONDS = 12, 20
"""When one process has failed, the others have so long to say who is missing (by default they know after four beats of
two seconds that are missed, and then end), and to stop before they are killed."""


def main() -> int:
    """Parse, then print or start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many processes (default: 2)")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices in each process (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("say what to start, after --, as in: -- epigone run configs/quickstart.py")
    if min(given.processes, given.devices) < 1:
        parser.error(f"--processes {given.processes} --devices {given.devices}: at least 1 of each")
    port = free_port()
    environments = [topology(rank, given.processes, given.devices, port) for rank in range(given.processes)]
    if given.dry_run:
        for variables in environments:
            print(shlex.join([*(f"{name}={value}" for name, value in variables.items()), *command]))
        return 0
    return start(command, environments)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def topology(rank: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """The environment of one process: who coordinates, how many there are, which one this is."""
    virtual = f"--xla_force_host_platform_device_count={devices}"
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(rank),
        **({"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {virtual}".strip()} if devices > 1 else {}),
    }


def start(command: list[str], environments: list[dict[str, str]]) -> int:
    """Run all processes to their end; end all when one fails. Returns the first exit code that is not 0."""
    running: list[subprocess.Popen] = []
    failed: list[int] = []

    def send(number: int, _frame: object = None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    def follow(rank: int, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            print(f"[{rank}] {line}", end="", flush=True)
        if process.wait() != 0 and not failed:
            failed.append(process.returncode)
            threading.Timer(TELL_SECONDS, send, [signal.SIGTERM]).start()
            threading.Timer(TELL_SECONDS + GRACE_SECONDS, send, [signal.SIGKILL]).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, send)
    for variables in environments:
        try:
            process = subprocess.Popen(
                command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            send(signal.SIGKILL)
            print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
            return 2
        running.append(process)
    followers = [threading.Thread(target=follow, args=(rank, process)) for rank, process in enumerate(running)]
    for follower in followers:
        follower.start()
    for follower in followers:
        follower.join()
    sys.stdout.flush()
    os._exit((failed[0] if failed[0] > 0 else 1) if failed else 0)  # without waiting for the timers


if __name__ == "__main__":
    sys.exit(main())
