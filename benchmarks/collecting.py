"""A million prompts to a stub that answers after a while: answers a second on one core, and memory on the way.

Everything but the network is real: questions are made, written as JSON and read again by the stub, answers go through
the client, the budget and the journal, which flushes them to the disk. The stub answers in this process, so its work
counts as the collector's. At the end the journal is asked whether each prompt stands there once.

    python benchmarks/collecting.py --prompts 1000000
"""

import argparse
import asyncio
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from epigone.arena.collector import Budget, Collection, Progress, Share, collect
from epigone.arena.endpoint import Asking, Endpoint
from epigone.arena.journal import Journal


class Stub(httpx.AsyncBaseTransport):
    """Answers each prompt with a dozen words after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        prompts = json.loads(await request.aread())["prompt"]
        self.asked += len(prompts)
        await asyncio.sleep(self.seconds)
        text = " and he went up to the hill and saw the sea"
        choices = [{"index": n, "text": text, "finish_reason": "stop", "logprobs": None} for n in range(len(prompts))]
        usage = {"prompt_tokens": 8 * len(prompts), "completion_tokens": 12 * len(prompts)}
        return httpx.Response(200, json={"choices": choices, "usage": usage})


def prompts(count: int) -> Iterator[str]:
    """As many as are wanted, none of them twice."""
    return (f"in the year {number} the king of the land said to" for number in range(count))


def memory() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000, help="default 1,000,000")
    parser.add_argument("--seconds", type=float, default=0.2, help="for an answer; default 0.2")
    parser.add_argument("--together", type=int, default=16, help="prompts in a question; default 16")
    parser.add_argument("--at-once", type=int, default=64, help="questions under way; default 64")
    given = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    endpoint = Endpoint("http://stub/v1", "stub", together=given.together, at_once=given.at_once)
    wanted = Collection("many", endpoint, prompts, Asking(max_tokens=32), Budget(questions=given.prompts))
    stub, told = Stub(given.seconds), list[float]()

    def on_progress(progress: Progress) -> None:
        if progress.now >= (len(told) + 1) * given.prompts // 10:
            told.append(memory())
            speed = progress.now / (time.monotonic() - began)
            print(f"{progress.now:>10,} answers  {speed:,.0f} a second  {told[-1]:,.0f} MB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        with Journal(Path(folder) / "journal.sqlite", wanted.settings) as journal:
            began, cpu = time.monotonic(), time.process_time()
            asyncio.run(collect(wanted, journal, prompts(given.prompts), Share(), on_progress, stub))
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            totals = journal.totals
            if (totals.questions, totals.answers, stub.asked) != (given.prompts,) * 3:
                raise SystemExit(f"{stub.asked} were asked and {totals} kept, of {given.prompts} prompts")
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"{given.prompts / seconds:,.0f} answers a second ({given.prompts / cpu:,.0f} a second of processor time)")
    print(f"memory {told[0]:,.0f} MB at a tenth, {told[-1]:,.0f} at the end; {size / given.prompts:,.0f} bytes each")


if __name__ == "__main__":
    main()
