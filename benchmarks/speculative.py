"""Speculative decoding with a distilled student as the draft, beside plain sampling, in one alternating run.

By default a target is trained on the Bible in Basic English and a student is distilled from it by the project's own
trainer, in about two minutes on two cores; with --run, two nodes of a run are taken. Every round times plain sampling
and every draft length once, in an order that rotates; what is printed are medians over the rounds, and quartiles of the
speed-up within a round. No end of text stops anyone early.

The expected speed-up is that of Leviathan et al. 2023, theorem 3.8: (1 - a^(k+1)) / ((1 - a)(k c + 1)), where k is the
draft length, a the share of judged proposals that were accepted, and c the cost of a step of the draft alone beside one
of the target alone. It takes a pass of the target over k + 1 tokens to cost as much as one over a single token; the
columns "pass" show what a whole pass costs, draft included, in plain steps of the target: k c + 1 by the formula, and
as measured.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from epigone.runtime import prepare

prepare()  # before JAX is imported, which reads some of these settings then

# ruff: noqa: E402

import numpy as np

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.errors import Fault, UserError
from epigone.families import fan_out
from epigone.grow import grow
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.models.decoder import parameter_count
from epigone.models.sharding import Sharding
from epigone.opened import open_node
from epigone.sampling.decode import DecoderLanguageModel, sample
from epigone.sampling.loop import prepare as prepare_parameters
from epigone.sampling.speculative import Model, SpeculationReport, speculative_sample
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer
from epigone.view import Terminal

BATCHES = (1, 8)
DRAFT_LENGTHS = (2, 4, 6)
TARGET = DecoderConfig(layers=8, model_size=256, heads=4, max_length=128)
DRAFT = DecoderConfig(layers=1, model_size=64, heads=2, max_length=128)
PROMPTS = (
    "and the lord said to",
    "in the land of",
    "give ear to the words of my",
    "and they took the king and put him to",
    "he has a good",
    "let your heart be full of",
    "and it came about that",
    "then the men of the town",
)


class Timed(NamedTuple):
    """Seconds of one call, and what its speculation came to; None for plain sampling."""

    seconds: float
    report: SpeculationReport | None


Job = Callable[[int], SpeculationReport | None]
"""Writes with a seed."""


def lineage(steps: int) -> Lineage:
    """A target on real text, and a student of a few hundredths of its size that learns from its scores."""
    bible = Embedded("bbe", unit="verse")
    words = TrainedTokenizer(Words(lowercase=True), Text(bible))

    def node(name: str, model: DecoderConfig, steps: int, objective: Objective) -> Node:
        optimizer = Optimizer(learning_rate=3e-3, warmup_steps=20)
        training = Training(steps=steps, batch_size=8, sequence_length=64, optimizer=optimizer)
        return Node(name, 0, model, words, Lesson((Text(bible),), objective=objective, training=training))

    target = node("target", TARGET, steps, Objective(hard_weight=1.0))
    draft = node("draft", DRAFT, steps, Objective(divergence=forward_kl))
    return Lineage("speculative", (target, *fan_out(target, [draft])), evaluation=None)


def grown(folder: Path, steps: int) -> Path:
    """A run directory with a target and a draft."""
    made = lineage(steps)
    with Terminal(made.name, {node.key: 1.0 for node in made.nodes}) as view:
        grow(made, folder / "run", data=folder / "data", view=view)
    return folder / "run"


def endless(model: Any) -> Model:
    """Config and parameters of a decoder that never ends a text. Raises SystemExit for another kind of model."""
    if not isinstance(model, DecoderLanguageModel):
        raise SystemExit("target and draft must be decoders: an n-gram has no cache to speculate with")
    specials = model.config.specials
    never = tuple(sorted({*specials.never, specials.eos, *specials.stops}))
    return replace(model.config, specials=replace(specials, never=never)), model.params


def jobs_of(target: Model, draft: Model, prompts: list[np.ndarray], length: int) -> dict[str, Job]:
    """Plain sampling with either model, and speculation with every draft length."""

    def plain(model: Model) -> Job:
        prepared = prepare_parameters(model[0], Sharding(), model[1])

        def job(seed: int) -> None:
            sample(*model, prompts, seed, length=length, slots=len(prompts), prepared=prepared)

        return job

    def drafted(k: int) -> Job:
        return lambda seed: speculative_sample(target, draft, prompts, seed, length=length, draft_length=k)[1]

    return {"plain": plain(target), "draft": plain(draft)} | {f"k = {k}": drafted(k) for k in DRAFT_LENGTHS}


def measure(jobs: dict[str, Job], rounds: int) -> dict[str, list[Timed]]:
    """Every job in every round; each round begins with another job."""
    names = list(jobs)
    for name in names:
        jobs[name](0)
    found: dict[str, list[Timed]] = {name: [] for name in names}
    for round in range(rounds):
        first = round % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            report = jobs[name](round + 1)
            found[name].append(Timed(time.perf_counter() - start, report))
    return found


def expected(a: float, k: int, c: float) -> float:
    """Leviathan et al. 2023, theorem 3.8."""
    tokens = k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)
    return tokens / (k * c + 1)


def show(found: dict[str, list[Timed]], batch: int, length: int) -> None:
    """A row for each draft length."""
    plain, alone = (np.array([timed.seconds for timed in found[name]]) for name in ("plain", "draft"))
    c, step = float(np.median(alone / plain)), np.median(plain) / length
    print(f"\nbatch {batch}: plain {batch * length / np.median(plain):.0f} tokens/s, c = {c:.3f}")
    print("  k  accepted  of judged  tokens a pass  pass (k c + 1)  pass  speed-up expected  measured   quartiles")
    for k in DRAFT_LENGTHS:
        timed = found[f"k = {k}"]
        reports = [t.report for t in timed if t.report]
        sums = {name: sum(getattr(r, name) for r in reports) for name in SpeculationReport.__dataclass_fields__}
        total, seconds = SpeculationReport(**sums), np.array([t.seconds for t in timed])
        low, middle, high = np.quantile(plain / seconds, (0.25, 0.5, 0.75))
        cost = np.median(seconds / [r.passes for r in reports]) / step
        print(
            f"{k:3}{total.acceptance_rate:10.2f}{total.judged_rate:11.2f}{total.tokens_per_pass:15.2f}{k * c + 1:16.2f}"
            f"{cost:6.2f}{expected(total.judged_rate, k, c):19.2f}{middle:10.2f}{low:8.2f}-{high:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory with both nodes; by default they are grown here")
    parser.add_argument("--target", default="target", help="the node that is sampled from")
    parser.add_argument("--draft", default="draft", help="the node that proposes; it reads the same tokens")
    parser.add_argument("--steps", type=int, default=150, help="training steps of both models (default 150)")
    parser.add_argument("--length", type=int, default=64, help="new tokens of each text (default 64)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all jobs (default 9)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = given.run or grown(Path(folder), given.steps)
            opened = [open_node(name, run) for name in (given.target, given.draft)]
            target, draft = (endless(node.model) for node in opened)
            prompts = [opened[0].tokenizer.encode(text) for text in PROMPTS]
            counts = [f"{parameter_count(config):,}" for config, _ in (target, draft)]
            print(f"target {given.target}: {counts[0]} weights, draft {given.draft}: {counts[1]} weights")
            for batch in BATCHES:
                jobs = jobs_of(target, draft, prompts[:batch], given.length)
                show(measure(jobs, given.rounds), batch, given.length)
        except (Fault, UserError) as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
