"""A teacher with another tokenizer: students of 512 byte pairs that learn from a teacher of 2,048.

What     On the Bible in Basic English: a transformer that reads 2,048 byte pairs, and small ones that read 512, trained
         from nothing on three per cent of the text in six ways: on the text alone (control); beside the text from the
         teacher by sorted probabilities (ULD), by the likelihoods of chunks (ALM) and by the tokens that both
         vocabularies have; and by the last two from the teacher alone, on the student's own texts at half of the steps.
Why      Boizard et al. 2024 (ULD) and Minixhofer et al. 2025 (ALM): most good teachers have not the student's
         tokenizer. Here the two vocabularies have nearly all of the student's tokens in common.
Command  epigone run configs/other_tokenizer.py
Cost     Measured: two minutes on two cores (2.8 minutes of processor time), and 1.4 GiB.
Expect   Against the text alone, held-out bits a byte fall by 0.05 with the common tokens and by 0.03 with the chunks,
         and rise by 0.06 with ULD. From nothing, own texts teach little. docs/lessons.md has the figures.
"""

from functools import partial

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import BPE
from epigone.lessons.alignment import common_tokens, likelihood_matching, uld
from epigone.lessons.divergences import jsd
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.on_policy import OnPolicy
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
THEIRS, OURS = (TrainedTokenizer(BPE(size), Text(BIBLE)) for size in (2048, 512))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=256)
SMALL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=256)

OWN = OnPolicy(share=0.5, prompt_tokens=0, max_new=95)

WAYS: dict[str, tuple[Objective, OnPolicy | None]] = {
    "control": (TEXT_ALONE, None),
    # Boizard et al.: cross-entropy + 1.5 ULD.
    "uld": (Objective(uld, hard_weight=0.4), None),
    "chunks": (Objective(likelihood_matching, hard_weight=0.4), None),
    "common-tokens": (Objective(common_tokens, hard_weight=0.4), None),
    "chunks-own": (Objective(likelihood_matching), OWN),
    "common-own": (Objective(partial(common_tokens, divergence=jsd)), OWN),
}
"""What each of the students is taught towards, and on whose texts."""


def lineage(seeds: int = 2, steps: int = 150, teacher_steps: int = 300) -> Lineage:
    """A teacher, and students of other tokens in every way.

    Args:
        seeds: repetitions of every student, on other parts of the text, whose spread the report gives; at most 7.
        steps: training steps of each student.
        teacher_steps: training steps of the teacher.
    """

    def training(steps: int, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(steps, 8, sequence_length=96, optimizer=optimizer)

    alone = Lesson((Text(BIBLE),), objective=TEXT_ALONE, training=training(teacher_steps, 4e-3))
    teacher = Node("teacher", 0, LARGE, THEIRS, alone, labels={"family": "other-tokenizer", "role": "teacher"})
    nodes = [teacher]
    for seed in range(seeds):
        crumbs = (Text(BIBLE, skip=50_000 * seed, tokens=50_000),)
        for name, (objective, own) in WAYS.items():
            taught = teacher.key if objective.needs_teacher else None
            lesson = Lesson(crumbs, teacher=taught, objective=objective, training=training(steps, 3e-3), on_policy=own)
            role = "student" if taught else "control"
            nodes.append(Node(name, 1, SMALL, OURS, lesson, seed, labels={"family": "other-tokenizer", "role": role}))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=20_000), real=Text(BIBLE), write_tokens=0, contexts=500
    )
    return Lineage("other-tokenizer", tuple(nodes), evaluation, __doc__.partition("\n")[0])
