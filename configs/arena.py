"""Through the prompt box: what a student outside learns from what a provider shows, and what each measure takes away.

What     A teacher answers prompts. Students outside read its answers, or also the scores that the box shows: the best
         few, rounded, with noise, at another temperature, with a watermark. Every measure meets a collector that takes
         it as it comes and one that knows of it. Some ask for four and sixteen times as much; some are smaller. And
         teachers learn text in which words were replaced, and students what they make of it.
Why      What a provider shows decides how cheap a copy is; what a measure is worth shows only against one who knows it.
Command  epigone run configs/arena.py --jobs 2
Cost     About 40 minutes on two CPU cores.
Expect   Perplexity of students of 80,000 tokens: text 69, five scores and text 56, twenty scores 52. Rounding, noise
         and a watermark change little of that for one who knows of them. docs/arena.md has all of it.
"""

from dataclasses import dataclass, replace
from typing import Any

from epigone.arena.policies import Best, Hidden, Noisy, Policy, Rounded, Tempered
from epigone.arena.traffic import Extractor
from epigone.arena.watch import Watch
from epigone.data.corpora import Embedded, Noised
from epigone.data.tokenizers import BPE
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Claim, Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.sampling.watermark import GreenList
from epigone.teachers.kept import Shown
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
PIECES = TrainedTokenizer(BPE(1024), Text(BIBLE))
LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = replace(LARGE, model_size=96)

SECRET = 20_260_101
"""Of the watermark and of the noise: the collectors do not have it."""

FLAT = 1.5
"""The temperature of a box that flattens what it says."""

MIXED = Objective(forward_kl, hard_weight=0.5)
"""Scores and the text beside them: noise is on scores alone."""


@dataclass(frozen=True)
class Way:
    """How a collector learns from a box.

    Attributes:
        box: what it shows.
        objective: of the student.
        rest: what is made of the scores that are not shown.
        times: what shown scores are multiplied by.
        best: scores that are asked for of a place; None: it learns from the text.
    """

    box: Policy
    objective: Objective = Objective(forward_kl)
    rest: str = "bucket"
    times: float = 1.0
    best: int | None = 20


TEXT = Objective(hard_weight=1.0)
FIVE, MANY = Best(5, own=True), Best(20, own=True)
GREEN, FLATTER = GreenList(SECRET), Tempered(FLAT)

WAYS = {
    "text": Way(Policy(), TEXT, best=None),
    "best5": Way(Policy(scores=(FIVE,))),
    "best5-as-all": Way(Policy(scores=(FIVE,)), rest="zero"),
    "best5-and-text": Way(Policy(scores=(FIVE,)), MIXED),
    "best20": Way(Policy(scores=(MANY,))),
    "best20-and-text": Way(Policy(scores=(MANY,)), MIXED),
    "rounded": Way(Policy(scores=(FIVE, Rounded(0)))),
    "rounded-and-text": Way(Policy(scores=(FIVE, Rounded(0))), MIXED),
    "noisy": Way(Policy(scores=(MANY, Noisy(SECRET, 1.0)))),
    "noisy-and-text": Way(Policy(scores=(MANY, Noisy(SECRET, 1.0))), MIXED),
    "flat-text": Way(Policy((FLATTER,)), TEXT, best=None),
    "flat": Way(Policy((FLATTER,), (MANY,))),
    "flat-undone": Way(Policy((FLATTER,), (MANY,)), times=FLAT),
    "marked-text": Way(Policy((GREEN,)), TEXT, best=None),
    "marked": Way(Policy((GREEN,), (MANY,))),
}
"""The ways that are tried with the same number of tokens."""

WANTED = 5_000
EXTRACTORS = {
    "plain": Extractor(WANTED),
    "one frame": Extractor(WANTED, framed=1.0),
    "hard prompts": Extractor(WANTED),
    "slow": Extractor(WANTED, every=600.0, jitter=1.5),
    "hidden among other queries": Extractor(WANTED, every=60.0, mixed=0.8, jitter=3.0),
    "forty accounts": Extractor(WANTED, every=1200.0, accounts=40, jitter=1.5),
    "forty that hide": Extractor(WANTED, every=1200.0, accounts=40, mixed=0.8, jitter=3.0),
}
"""Who wants to copy: the first three ask as they come, the others know what detectors look at."""


def lineage(seeds: int = 2, tokens: int = 80_000, scale: float = 1.0) -> Lineage:
    """A teacher behind a box, and students outside.

    Args:
        seeds: repetitions of every student; each asks other prompts.
        tokens: that a student asks for, prompts included; some ask for a quarter, and some for four times as many.
        scale: factor on the training steps; less is faster and worse.
    """

    quarter, usual, fourfold = {tokens // 4: 80}, {tokens: 300}, {4 * tokens: 900}
    steps_of = quarter | usual | fourfold  # about three passes over what was asked for

    def training(steps: int, batch_size: int, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(scale * steps)), batch_size, sequence_length=128, optimizer=optimizer)

    def teacher(name: str, corpus: Any) -> Node:
        lesson = Lesson((Text(corpus),), objective=TEXT, training=training(400, 16, 4e-3))
        return Node(name, 0, LARGE, PIECES, lesson, labels={"role": "teacher", "family": name})

    def student(name: str, kind: str, asked: int, seed: int, model: DecoderConfig = SMALL) -> Node:
        way = WAYS[kind]
        prompts = Text(BIBLE, split="train", skip=200_000 * seed)
        text = Written("teacher@0", asked, max_length=64, prompts=prompts, prompt_tokens=6, marks=way.box.marks)
        scores = None if way.best is None else Shown(way.box, way.best, way.rest, way.times)
        lesson = Lesson(
            (replace(text, draw=seed),),
            teacher="teacher@0" if scores else None,
            scores=scores,
            objective=way.objective,
            training=training(steps_of[asked], 8, 3e-3),
        )
        labels = {"family": "students", "way": name if model != SMALL else kind, "asked": str(asked)}
        return Node(name, 1, model, PIECES, lesson, seed=seed, labels=labels)

    nodes = [teacher("teacher", BIBLE)]
    for seed in range(seeds):
        nodes += [student(name, name, tokens, seed) for name in WAYS]
        for name in ("text", "best5-and-text"):
            nodes += [
                student(f"{name}-quarter", name, tokens // 4, seed),
                student(f"{name}-fourfold", name, 4 * tokens, seed),
            ]
        for size in (64, 32, 16):
            model = replace(SMALL, model_size=size)
            nodes.append(student(f"narrow-{size}", "best5-and-text", 4 * tokens, seed, model))
    for percent in (10, 20, 40):
        noisy = Noised(BIBLE, percent / 100)
        nodes.append(teacher(f"noised{percent}", noisy))
    for percent in (0, 10, 20, 40):
        by = f"noised{percent}@0" if percent else "teacher@0"
        for seed in range(seeds):
            real = Text(Noised(BIBLE, percent / 100) if percent else BIBLE, skip=200_000 * seed, tokens=4 * tokens)
            answers = Written(by, 4 * tokens, top_p=0.8, max_length=64, draw=seed)
            for name, source in (("noisy-text", real), ("cleaned-up", answers)):
                lesson = Lesson((source,), objective=TEXT, training=training(300, 8, 3e-3))
                labels = {"family": f"{percent} % noise"}
                nodes.append(Node(f"{name}{percent}", 1, SMALL, PIECES, lesson, seed=seed, labels=labels))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=5_000,
        contexts=2_000,
        prompts=("and the lord said to", "in the land of"),
        compare={name: "teacher@0" for name in ("text", "text-quarter", "text-fourfold", "marked-text", "flat-text")},
    )
    return Lineage("arena", tuple(nodes), evaluation, __doc__.partition("\n")[0], claims=_claims(), watch=_watch())


def _watch() -> Watch:
    """Traffic at the box, and what each policy costs honest users."""
    boxes = {name: way.box for name, way in WAYS.items() if name in ("best5", "best20", "rounded", "noisy", "marked")}
    boxes = {"all": Policy(), "no scores": Policy(scores=(Hidden(),)), **boxes, "flat": WAYS["flat"].box}
    return Watch("teacher@0", Text(BIBLE), EXTRACTORS, hard=("hard prompts",), boxes=boxes)


COMMON = "a common claim"


def _claims() -> tuple[Claim, ...]:
    """What is commonly said of copies."""
    said = {
        "Scores are worth many queries: twenty of them a token teach more than four times as much text.": (
            "best20-and-text@1",
            "text-fourfold@1",
        ),
        "A student can be much smaller: a third of the width, with scores, is better than all of it with text.": (
            "narrow-32@1",
            "text-fourfold@1",
        ),
    }
    claims = [Claim(says, COMMON, order) for says, order in said.items()]
    for percent in (0, 10, 20, 40):
        says = f"A teacher's cleaned-up answers teach better than the text that it learned, of {percent} % noise"
        cleaned, noisy = f"cleaned-up{percent}@1", f"noisy-text{percent}@1"
        claims.append(Claim(f"{says}: to be less surprised.", COMMON, (cleaned, noisy)))
        claims.append(Claim(f"{says}: to guess the next word.", COMMON, (noisy, cleaned), metric="accuracy"))
    return tuple(claims)
