"""The way that works: a larger teacher and ever smaller students, generation after generation.

What     A transformer of 1.2 M weights reads 300,000 words. Three generations after it are smaller each time, and have
         20,000 words of real text. In four ways: each learns the scores of the one before (ladder), all learn those of
         the first (direct), each reads 100,000 words that the one before wrote (text), nobody teaches them (alone).
         And a chain of one size that learns its parent's scores (born again).
Why      Hinton et al. 2015: scores carry what a text of this size lacks. Mirzadeh et al. 2020 (arXiv 1902.03393): steps
         between teacher and student can help. Furlanello et al. 2018 (1805.04770): students of one size can pass their
         teachers. Against `replace` these chains need not collapse: real text and a stronger teacher hold them.
Command  epigone run configs/generations/ladder.py
Cost     About eight minutes on two CPU cores.
Expect   Smaller students are worse than larger ones, and at every size taught by scores is better than alone.
"""

from collections.abc import Sequence
from dataclasses import replace as change

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.families import chain, fan_out
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Claim, Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))
SIZES = (128, 96, 64, 48)
SOFT = Objective(divergence=forward_kl, temperature=2.0)


def lineage(seeds: int = 2, crumbs: int = 20_000, tokens: int = 300_000, steps: int = 240) -> Lineage:
    """Ladders of scores and of text, students of the first teacher, and students without one.

    Args:
        seeds: repetitions of the students, each with other crumbs of real text.
        crumbs: tokens of real text that a student has.
        tokens: that the teacher read.
        steps: of a student's training; the teacher has more.
    """
    teacher = _reads(SIZES[0], Text(BIBLE, tokens=tokens), steps=round(1.75 * steps), batch=8)
    nodes: list[Node] = [teacher]
    for seed in range(seeds):
        own = Text(BIBLE, skip=tokens + seed * crumbs, tokens=crumbs)

        def read(_real: Text, _written: Sequence[Written], own: Text = own) -> tuple[Text, ...]:
            return (own,)

        def written(_real: Text, written: Sequence[Written]) -> tuple[Written, ...]:
            return (change(written[-1], tokens=5 * crumbs),)

        root = change(teacher, seed=seed) if seed else teacher
        nodes += [root] if seed else []
        alone = [_reads(size, own, steps=steps, seed=seed) for size in SIZES[1:]]
        taught = [change(node, lesson=change(node.lesson, objective=SOFT)) for node in alone]
        same = [change(taught[0], model=teacher.model)]
        rungs = len(alone)
        ladder = chain(root, rungs, read, name="ladder", successors=taught, scores=True)
        nodes += _named(ladder, "ladder of scores")
        nodes += _named(chain(root, rungs, written, name="text", successors=alone), "ladder of text")
        nodes += _named(chain(root, rungs, read, name="again", successors=same, scores=True), "born again, one size")
        for number, node in enumerate(fan_out(root, taught), start=1):
            nodes += _named([change(node, name="direct", generation=number)], "from the first teacher")
        for number, node in enumerate(alone, start=1):
            nodes += _named([change(node, name="alone", generation=number)], "alone")
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=20_000), real=Text(BIBLE), write_tokens=8_000, contexts=200
    )
    last = len(SIZES) - 1
    claims = (
        Claim(
            "a student of scores is better than one without a teacher", "Hinton et al. 2015", ("direct@1", "alone@1")
        ),
        Claim(
            "steps between teacher and student help a small student",
            "Mirzadeh et al. 2020",
            (f"ladder@{last}", f"direct@{last}"),
        ),
        Claim("a student of one size passes its teacher", "Furlanello et al. 2018", ("again@2", "again@1")),
    )
    return Lineage("ladder", tuple(nodes), evaluation, __doc__.partition("\n")[0], claims=claims)


def _reads(size: int, text: Text, *, steps: int, batch: int = 4, seed: int = 0) -> Node:
    optimizer = Optimizer(learning_rate=4e-3 if size == SIZES[0] else 3e-3, warmup_steps=20)
    training = Training(steps=steps, batch_size=batch, sequence_length=128, optimizer=optimizer)
    model = DecoderConfig(layers=2, model_size=size, heads=4, max_length=128)
    lesson = Lesson(text=(text,), objective=TEXT_ALONE, training=training)
    return Node("teacher", 0, model, WORDS, lesson, seed=seed, labels={"family": "generations of smaller models"})


def _named(nodes: Sequence[Node], regime: str) -> list[Node]:
    return [change(node, labels={"family": "generations of smaller models", "regime": regime}) for node in nodes]
