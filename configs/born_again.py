"""Born-again networks and a student that is its own teacher: what scores give that come from nobody larger.

What     On a tenth of the Bible in Basic English: a small transformer; three generations of its size, each begun afresh
         and taught by the scores of the one before and by the text, half and half; a student of all four together; the
         same model with a running average of its weights; and one that learns from the scores of that average. Control:
         the same model trained once more, on the text alone.
Why      Furlanello et al. 2018 (born-again networks): a student of its teacher's size is better than its teacher, and
         all generations together are best. Tarvainen & Valpola 2017 (mean teacher): the running average of the weights
         is a better model, and so can teach them while they are trained.
Command  epigone run configs/born_again.py
Cost     Measured: three and a half minutes and 1.9 GiB on two CPU cores.
Expect   Held-out perplexity: teacher 91, control 92, generations 87, 85 and 82, the student of all 84. The running
         average of the weights, 97, and its student, 101, gain nothing. docs/lessons.md has the figures.
"""

from dataclasses import replace as change

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.families import born_again, fan_out
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lessons.schedules import Linear
from epigone.lineage import Claim, Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

MODEL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=128)


def lineage(
    seeds: int = 2, generations: int = 3, tokens: int = 80_000, steps: int = 360, ema_decay: float = 0.98
) -> Lineage:
    """A teacher, its born-again generations and a student of them all; a student that is its own teacher; controls.

    Args:
        seeds: repetitions of every recipe whose spread the report gives, each with a part of the text of its own.
        generations: after the teacher.
        tokens: of the text that all models of a seed read.
        steps: training steps of each model.
        ema_decay: of the running average of weights, where there is one.
    """
    training = Training(steps, 4, sequence_length=128, optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20))
    averaged = change(training, ema_decay=ema_decay)
    both = Objective(forward_kl, hard_weight=0.5)
    # A student and its average agree at first: the text counts alone, and then as much as the average.
    ramp = Objective(forward_kl, hard_weight=Linear(1.0, 0.5, steps=max(1, steps // 3)))
    nodes: list[Node] = []
    for seed in range(seeds):
        text = (Text(BIBLE, skip=tokens * seed, tokens=tokens),)
        alone = Lesson(text, objective=TEXT_ALONE, training=training)
        labels = {"family": "born-again", "role": "teacher"}
        teacher = Node("teacher", 0, MODEL, WORDS, alone, seed, labels=labels)
        chain = born_again(teacher, generations, both)
        again = change(alone, initialisation=1)
        control = change(teacher, name="control", generation=1, lesson=again, labels={**labels, "role": "control"})

        def student(name: str, lesson: Lesson, like: Node = control) -> Node:
            return change(like, name=name, lesson=lesson, labels={**like.labels, "role": "student"})

        everyone = student("student-of-all", change(again, objective=both, initialisation=generations + 1))
        nodes += [teacher, control, *chain, *fan_out([teacher, *chain], [everyone])]
        nodes += [
            student("average", change(again, training=averaged)),
            student("mean-teacher", change(again, training=averaged, objective=ramp, mean_teacher=True)),
        ]
    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=5_000,
        contexts=500,
    )
    claims = (
        Claim("a student of one size passes its teacher", "Furlanello et al. 2018", ("born-again@1", "teacher@0")),
    )
    return Lineage("born-again", tuple(nodes), evaluation, __doc__.partition("\n")[0], claims=claims)
