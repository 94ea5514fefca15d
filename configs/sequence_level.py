"""Sequence-level distillation: students that read what their teacher wrote, as it came or chosen, and completions.

What     On the Bible in Basic English: a transformer teacher, and small students that read its text: as it was sampled;
         the best of four candidates for each verse; the best quarter of the verses, by the word of a trigram model;
         verses of the real text that the teacher completed; and its text with its scores. Controls: a student that
         learns from the teacher's scores of a little real text, one that reads that text alone, and one that reads as
         much real text as the teacher writes.
Why      Kim & Rush 2016: what a teacher writes is easier to learn than what people wrote, most of all its most probable
         texts; and its scores of them help further. Where real text is short, a teacher can write more.
Command  epigone run configs/sequence_level.py
Cost     Measured: four minutes on two cores, and 2.2 GiB.
Expect   Held-out perplexity: the text at hand 127, sampled, best of four and completed 114, filtered 110, as much real
         text 108, sampled text with scores 80, the text at hand with scores 76. The best of four makes a student's own
         text probable, not its knowledge greater. docs/lessons.md has the figures.
"""

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=128)


def lineage(seeds: int = 2, real: int = 20_000, tokens: int = 80_000, steps: int = 240, scale: float = 1.0) -> Lineage:
    """A teacher, a judge, and students of the texts that the teacher writes.

    Args:
        seeds: repetitions of every student whose spread the report gives; all read the same written texts.
        real: tokens of real text that are at hand, another part for every seed.
        tokens: that the teacher writes for each kind of student.
        steps: training steps of each student.
        scale: factor on the training steps of the teacher; less is faster and worse.
    """

    def training(steps: float, rate: float, batch_size: int) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(steps)), batch_size, sequence_length=128, optimizer=optimizer)

    alone = Lesson((Text(BIBLE),), objective=TEXT_ALONE, training=training(scale * 420, 4e-3, 8))
    teacher = Node("teacher", 0, LARGE, WORDS, alone, labels={"family": "sequence-level", "role": "teacher"})
    judge = Node("judge", 0, NGram(order=3), WORDS, Lesson((Text(BIBLE),)), labels={"family": "sequence-level"})

    written = {"by": teacher.key, "tokens": tokens}
    sampled = Written(**written)
    best = Written(**written, best_of=4)
    filtered = Written(**written, keep=0.25, judge=judge.key)
    nodes = [teacher, judge]
    for seed in range(seeds):
        few = Text(BIBLE, skip=real * seed, tokens=real)
        ways: dict[str, tuple[Text | Written, Objective]] = {
            "few": (few, TEXT_ALONE),
            "as-much": (Text(BIBLE, skip=tokens * seed, tokens=tokens), TEXT_ALONE),
            "few-scores": (few, Objective(forward_kl)),
            "sampled": (sampled, TEXT_ALONE),
            "best-of-4": (best, TEXT_ALONE),
            "filtered": (filtered, TEXT_ALONE),
            "prompted": (Written(**written, prompts=few, prompt_tokens=4), TEXT_ALONE),
            "sampled-scores": (sampled, Objective(forward_kl)),
        }
        for name, (text, objective) in ways.items():
            lesson = Lesson(
                (text,),
                teacher=teacher.key if objective.needs_teacher else None,
                objective=objective,
                training=training(steps, 3e-3, 4),
            )
            role = "control" if isinstance(text, Text) and not lesson.teacher else "student"
            labels = {"family": "sequence-level", "role": role}
            nodes.append(Node(name, 1, SMALL, WORDS, lesson, seed, labels=labels))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=10_000,
        contexts=500,
        compare={node.name: teacher.key for node in nodes[2:]},
    )
    return Lineage("sequence-level", tuple(nodes), evaluation, __doc__.partition("\n")[0])
