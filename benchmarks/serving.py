"""A served node under a crowd: 200 locust users who ask as fast as they are answered, held against its own sampler.

The server is a process of its own, as `epigone serve` starts it; the crowd is another, of locust. Every question is
another one. When the crowd has gone, its answers are held against the server's log: each question that was answered
stands there once, with as many tokens; and the tokens a second are a ratio to what the sampler writes for the same
prompts in one call, with as many slots, before and after.

    python benchmarks/serving.py runs/quickstart/teacher@0        (pip install locust)
"""

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

HEADS = ("and the lord said", "in the land of", "the king", "then he went up to", "a word of")
LENGTH = 32
MANY = 10**6
"""Questions that one user does not reach: number and user make the seed, by which the log is read again."""


def prompt_of(user: int, number: int) -> str:
    """A question that nobody else asks."""
    return f"{HEADS[(user + number) % len(HEADS)]} {user} {number}"


if "EPIGONE_ANSWERS" in os.environ:  # this file as locust reads it
    from itertools import count

    from locust import FastHttpUser, constant, events, task

    answers: list[tuple[int, int, int]] = []
    users = count()

    class Asker(FastHttpUser):
        """Asks again as soon as it is answered."""

        wait_time = constant(0)

        def on_start(self) -> None:
            self.number, self.asked = next(users), 0

        @task
        def ask(self) -> None:
            self.asked += 1
            body = {
                "prompt": prompt_of(self.number, self.asked),
                "seed": self.number * MANY + self.asked,
                "max_tokens": LENGTH,
            }
            body |= {"model": os.environ["EPIGONE_MODEL"]}
            headers = {"Authorization": f"Bearer {os.environ['EPIGONE_KEY']}"}
            answer = self.client.post("/v1/completions", json=body, headers=headers)
            if answer.status_code == 200:
                answers.append((self.number, self.asked, answer.json()["usage"]["completion_tokens"]))

    @events.quitting.add_listener
    def write_down(environment, **_) -> None:
        Path(os.environ["EPIGONE_ANSWERS"]).write_text(json.dumps(answers))


def sampled(node, slots: int, texts: int) -> float:
    """Tokens a second of the sampler by itself."""
    from epigone.sampling.decode import DecoderLanguageModel

    prompts = [node.tokenizer.encode(prompt_of(n, 1)) for n in range(texts)]
    model = DecoderLanguageModel(node.model.config, node.model.params, slots=slots)
    model.sample(prompts[: 4 * slots], 0, length=LENGTH)
    began = time.monotonic()
    found = model.sample(prompts, 1, length=LENGTH)
    return sum(len(tokens) for row in found for tokens in row) / (time.monotonic() - began)


def serve(reference: str, box: Path, slots: int, users: int) -> tuple[subprocess.Popen, str, str]:
    """A server, where it answers, and its model's name."""
    command = [sys.executable, "-m", "epigone", "serve", reference, "--box", str(box), "--port", "0"]
    command += ["--slots", str(slots), "--waiting", str(2 * users), "--policy", "best5"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    name, url = re.match(r"(\S+) answers at (http://\S+)/v1", line).groups()
    return server, url, name


def crowd(url: str, name: str, key: str, users: int, seconds: int, folder: Path) -> list[list[int]]:
    """What the crowd was answered: user, question, tokens."""
    answers, command = folder / "answers.json", [sys.executable, "-m", "locust", "-f", __file__, "--headless"]
    command += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s", "--stop-timeout", "60"]
    command += ["--host", url, "--only-summary", "--loglevel", "ERROR"]
    environment = os.environ | {"EPIGONE_ANSWERS": str(answers), "EPIGONE_MODEL": name, "EPIGONE_KEY": key}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(shown.stdout or shown.stderr)
    return json.loads(answers.read_text())


def check(answers: list[list[int]], box: Path) -> int:
    """Every answer stands in the log once, as it was told. Raises SystemExit otherwise."""
    rows = sqlite3.connect(box).execute("SELECT settings, status, written FROM questions").fetchall()
    logged = Counter((json.loads(settings)["seed"], written) for settings, status, written in rows if status == 200)
    told = Counter((user * MANY + number, tokens) for user, number, tokens in answers)
    twice = sum(logged.values()) - len({seed for seed, _ in logged})
    if twice or logged != told or any(status is None for _, status, _ in rows):
        raise SystemExit(f"{twice} were answered twice; {logged - told} in the log alone, {told - logged} told alone")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node", help="RUN/KEY")
    parser.add_argument("--users", type=int, default=200, help="default 200")
    parser.add_argument("--seconds", type=int, default=30, help="default 30")
    parser.add_argument("--slots", type=int, default=32, help="default 32")
    given = parser.parse_args()
    from epigone.arena.accounts import Accounts
    from epigone.opened import open_node
    from epigone.runtime import prepare

    prepare()
    node = open_node(given.node)
    speeds = [sampled(node, given.slots, 512)]
    with tempfile.TemporaryDirectory() as folder:
        box = Path(folder) / "box.sqlite"
        with Accounts(box) as accounts:
            key = accounts.add("crowd", 10**9, 10**12)
        server, url, name = serve(given.node, box, given.slots, given.users)
        try:
            answers = crowd(url, name, key, given.users, given.seconds, Path(folder))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        asked = check(answers, box)
        with sqlite3.connect(box) as base:
            first, last = base.execute("SELECT min(time), max(time + seconds) FROM questions").fetchone()
            waited = [row[0] for row in base.execute("SELECT seconds FROM questions")]
    speeds.append(sampled(node, given.slots, 512))
    served = sum(tokens for _, _, tokens in answers) / (last - first)
    quartiles = np.percentile(waited, [50, 99])
    rate = len(answers) / (last - first)
    print(f"{asked:,} questions, {len(answers):,} answers, none lost, none twice: {rate:.1f} a second")
    print(f"median {quartiles[0]:.2f} s, 99 % within {quartiles[1]:.2f} s, of {given.users} users at once")
    print(
        f"{served:,.0f} tokens a second; the sampler alone {', '.join(f'{speed:,.0f}' for speed in speeds)}: ", end=""
    )
    print(f"{served / np.mean(speeds):.2f} of it")


if __name__ == "__main__":
    main()
