"""Objectives side by side: every divergence, hard labels, temperatures and schedules, on the same text and start.

What     On the Bible in Basic English: a transformer teacher, and students of half its weights that read the same text
         in the same order from the same start, and differ in what they are taught towards: each of the ten
         divergences; forward KL with half its weight on the text, at temperature 2 with and without the factor T^2;
         hard labels that fade in, a temperature that cools; and the text alone (control).
Why      Papers compare two or three of these at a time, each with a convention of its own. Here they are one field.
Command  epigone run configs/objectives.py
Cost     Measured: 35 nodes, twelve minutes on two cores (15 minutes of processor time); with --node, one
         process a node, five and a half minutes on ten cores.
Expect   Held-out perplexity: teacher 57, forward KL 69, JSD 76, reverse KL 87, the text alone 96, squared logits far
         behind. Hard labels that fade in cost nothing; half of the weight on them all the time does, and so does
         temperature 2.
"""

from functools import partial

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.lessons.divergences import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jsd,
    logit_mse,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lessons.schedules import Cosine, Linear
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=128)


def ways(steps: int) -> dict[str, Objective]:
    """What each student is taught towards, in `steps` steps."""
    half = max(1, steps // 2)
    return {
        "control": TEXT_ALONE,
        "forward-kl": Objective(forward_kl),
        "reverse-kl": Objective(reverse_kl),
        "symmetric-kl": Objective(symmetric_kl),
        "jsd": Objective(jsd),
        "skew-forward-kl": Objective(skew_forward_kl),
        "skew-reverse-kl": Objective(skew_reverse_kl),
        "adaptive-kl": Objective(adaptive_kl),
        "total-variation": Objective(total_variation),
        "alpha-beta": Objective(alpha_beta),
        "logit-mse": Objective(logit_mse),
        "jsd-tenth": Objective(partial(jsd, beta=0.1)),
        "half-hard": Objective(forward_kl, hard_weight=0.5),
        "hard-fades-in": Objective(forward_kl, hard_weight=Linear(0.0, 0.5, steps=half, after=half)),
        "warm": Objective(forward_kl, temperature=2.0),
        "warm-no-square": Objective(forward_kl, temperature=2.0, temperature_squared=False),
        "cooling": Objective(forward_kl, temperature=Cosine(2.0, 1.0, steps=half)),
    }


def lineage(seeds: int = 2, steps: int = 300, tokens: int = 160_000, scale: float = 1.0) -> Lineage:
    """A teacher, and a student for every objective.

    Args:
        seeds: repetitions of every student, each with a part of the text of its own, at most 5.
        steps: training steps of each student.
        tokens: of the text that each student reads.
        scale: factor on the training steps of the teacher; less is faster and worse.
    """

    def training(steps: float, batch_size: int, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(steps)), batch_size, sequence_length=128, optimizer=optimizer)

    alone = Lesson((Text(BIBLE),), objective=TEXT_ALONE, training=training(scale * 420, 8, 4e-3))
    teacher = Node("teacher", 0, LARGE, WORDS, alone, labels={"role": "teacher"})
    nodes = [teacher]
    for seed in range(seeds):
        text = (Text(BIBLE, skip=tokens * seed, tokens=tokens),)
        for name, objective in ways(steps).items():
            taught = objective.needs_teacher
            lesson = Lesson(
                text,
                teacher=teacher.key if taught else None,
                objective=objective,
                training=training(steps, 4, 3e-3),
            )
            labels = {"role": "student" if taught else "control", "objective": name}
            nodes.append(Node(name, 1, SMALL, WORDS, lesson, seed=seed, labels=labels))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=20_000,
        contexts=2_000,
        compare={"control": teacher.key},
    )
    return Lineage("objectives", tuple(nodes), evaluation, __doc__.partition("\n")[0])
