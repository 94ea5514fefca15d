"""Ten generations of trigrams, each on the text of the one before, with every metric: processor time.

A node counts words of the embedded corpus, smooths on validation text, writes as much as it read and is measured as in
configs/quickstart.py. What is printed is the time of this process' threads, user and system, from the first node to the
last record, and how much of it is generation 0's, which trains the tokenizer and encodes the whole corpus for all; the
preparation of the corpus as files is not in it.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from epigone.runtime import prepare

prepare()

# ruff: noqa: E402
from epigone import regimes
from epigone.families import chain
from epigone.grow import grow
from epigone.lineage import Lineage, Node
from epigone.materials import Materials
from epigone.store import Store
from epigone.verbs.run import load_config

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"


def generations(words: int, count: int, seed: int) -> Lineage:
    """The quickstart's first trigram on so many words, and its successors."""
    given = load_config(QUICKSTART)(seeds=1)
    first = given["trigram@0"]
    text = replace(first.lesson.text[0], tokens=words)
    first = replace(first, seed=seed, lesson=replace(first.lesson, text=(text,)))
    nodes = (first, *chain(first, count, regimes.replace, name="copy"))
    return Lineage("ten-generations", nodes, replace(given.evaluation, compare={}))


class Stages:
    """Adds up the processor time of each kind of work."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.nodes: list[float] = []
        self._name, self._began = "", time.process_time()

    def start(self, node: Node) -> None:
        """The view's: a node begins."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """The view's: another kind of work begins."""
        now = time.process_time()
        if self._name:
            self.seconds[self._name] += now - self._began
        self._name, self._began = name, now

    def step(self, report: Any) -> None:
        """The view's: a training step, of which there are none."""

    def finish(self, node: Node, record: dict[str, Any]) -> None:
        """The view's: a node is done."""
        self.stage("")
        self.nodes.append(time.process_time())


def main() -> None:
    """Grow, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=100_000, help="default 100000")
    parser.add_argument("--generations", type=int, default=10, help="default 10")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    given = parser.parse_args()
    print(f"{given.generations} generations after the first, {given.words:,} words each, {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for seed in range(given.rounds):
            lineage = generations(given.words, given.generations, seed)
            evaluation = lineage.evaluation
            materials = Materials(Store(place / str(seed), lineage, place / "data"))
            for text in (evaluation.text, evaluation.real):
                materials.strings(text)
            stages, began = Stages(), (time.process_time(), time.monotonic())
            grow(lineage, place / str(seed), data=place / "data", view=stages)
            spent, passed = time.process_time() - began[0], time.monotonic() - began[1]
            first = stages.nodes[0] - began[0]
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.seconds.most_common(4))
            told = f"{spent:.1f} s of processor time, {first:.1f} of them generation 0's, in {passed:.1f} s"
            print(f"seed {seed}: {told} ({parts})", flush=True)


if __name__ == "__main__":
    main()
