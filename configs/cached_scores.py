"""Scores that are kept on disk: how few of them are enough, and which.

What     One teacher is asked once. Students learn from all of its scores, from its 12 best as if there were no others,
         from the 12 best and one bucket for the others, from random draws in fewer bytes, and from the text.
Why      Anshumann et al. 2025, "Sparse Logit Sampling", table 1: the best 12 alone hurt loss and calibration;
         as many random draws are as good as all scores, since their mean is the teacher's distribution.
Command  epigone run configs/cached_scores.py
         (on several hosts that see one file system, before: epigone label configs/cached_scores.py)
Cost     About a quarter of an hour and 2 GiB on two CPU cores.
Expect   Held-out nats a token: full 3.74, drawn 3.77, control 4.07, bucket 4.10, best 4.43. Calibration error: best
         0.07, all others 0.03.
"""

from dataclasses import replace as change
from typing import Any

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import BPE
from epigone.families import fan_out
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.teachers.kept import RandomDraws, TopK
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
PIECES = TrainedTokenizer(BPE(1024), Text(BIBLE))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=96, heads=4, max_length=128)


def lineage(seeds: int = 3, entries: int = 12, draws: int = 24, tokens: int = 310_000, scale: float = 1.0) -> Lineage:
    """A teacher, and students that learn from more or less of its scores.

    Args:
        seeds: repetitions of every student, each with a part of the text of its own, at most 4.
        entries: of the best scores of a token that are kept.
        draws: random draws a token; of 24 at most 15 are different tokens here, on average.
        tokens: of the text that each student reads, once; of all seeds together at most 1,180,000.
        scale: factor on the training steps; less is faster and worse.
    """

    def training(steps: int, batch_size: int, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(scale * steps)), batch_size, sequence_length=128, optimizer=optimizer)

    alone = Lesson((Text(BIBLE),), objective=Objective(hard_weight=1.0), training=training(400, 16, 4e-3))
    teacher = Node("teacher", 0, LARGE, PIECES, alone, labels={"role": "teacher"})
    ways: dict[str, Any] = {
        "full": None,
        "drawn": RandomDraws(draws),
        "bucket": TopK(entries),
        "best": TopK(entries, rest="zero"),
    }
    nodes = [teacher]
    for seed in range(seeds):
        text = (Text(BIBLE, skip=tokens * seed, tokens=tokens),)
        lesson = Lesson(text, objective=Objective(forward_kl), training=training(300 * tokens // 310_000, 8, 3e-3))
        students = [
            Node(name, 1, SMALL, PIECES, change(lesson, scores=scores), seed=seed, labels={"scores": name})
            for name, scores in ways.items()
        ]
        nodes += fan_out(teacher, students)
        control = change(lesson, objective=Objective(hard_weight=1.0))
        nodes.append(Node("control", 1, SMALL, PIECES, control, seed=seed, labels={"role": "control"}))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=5_000,
        contexts=4_000,
        prompts=("and the lord said to", "in the land of"),
        compare={"control": teacher.key},
    )
    return Lineage("cached-scores", tuple(nodes), evaluation, __doc__.partition("\n")[0])
