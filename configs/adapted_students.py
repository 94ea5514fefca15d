"""Adapted students: a few trained numbers beside frozen weights, and weights of few bits, against all of them in full.

What     On the Bible in Basic English: a transformer teacher; a student that has learned another part of the text by
         itself; and that student taught by the teacher's scores. First with all of its weights trained. Then with
         low-rank adapters (LoRA) alone: of rank 64, which is that of the matrices, 8 and 2 on all matrices of the
         layers, and of rank 8 on queries and values. Then with products in int8 and int4 in the whole training
         (aware), and, as their control, the first one rounded to the same when it is done (rounded).
Why      Hu et al. 2021: the change that adapts a model has low rank, so that gradients and the optimizer's state of the
         weights themselves can be spared. Jacob et al. 2018: a model that is trained with rounded weights loses less by
         the rounding; with a teacher this is quantization-aware distillation (Polino et al. 2018).
Command  epigone run configs/adapted_students.py
Cost     Measured: four minutes on two cores (6 minutes of processor time), and 2.9 GiB.
Expect   Held-out perplexity: begin 114, rank 2 109, rank 8 105, rank 64 101, all weights 67: what adapters lack here is
         most likely the table of embeddings, four fifths of this model. Rounded to int8 nothing is lost; to int4
         0.9 (matrices) and 2.7 (activations too); training with int4 matrices regains a quarter.
"""

from dataclasses import replace as change

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.adapters import LowRank
from epigone.models.config import DecoderConfig
from epigone.models.quantization import Quantization
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=128)

ADAPTERS = {
    "lora-64": LowRank(rank=64, alpha=64.0),
    "lora-8": LowRank(rank=8, alpha=16.0),
    "lora-2": LowRank(rank=2, alpha=4.0),
    "lora-8-attention": LowRank(rank=8, alpha=16.0, targets=("query", "value")),
}
"""Beside which matrices of the student something is trained."""


QUANTIZATION = {
    "int8": Quantization("int8", activations="int8"),
    "int4": Quantization("int4"),
    "int4-both": Quantization("int4", activations="int4"),
}
"""Types of the products: of matrices and what they are multiplied with, of matrices alone, and of both again."""


def lineage(seeds: int = 2, steps: int = 150, scale: float = 1.0) -> Lineage:
    """A teacher, a student that has read by itself, and the same student taught in every way.

    Args:
        seeds: repetitions of every recipe whose spread the report gives, at most 7.
        steps: training steps of each way.
        scale: factor on the training steps of the teacher and of the beginning; less is faster and worse.
    """

    def training(steps: float, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(steps)), 8, sequence_length=128, optimizer=optimizer, compare_every=None)

    alone = Lesson((Text(BIBLE),), objective=TEXT_ALONE, training=training(scale * 400, 4e-3))
    teacher = Node("teacher", 0, LARGE, WORDS, alone, labels={"family": "adapted", "role": "teacher"})
    nodes = [teacher]
    for seed in range(seeds):
        read, taught = (Text(BIBLE, skip=start + 60_000 * seed, tokens=60_000) for start in (0, 400_000))
        first = Lesson((read,), objective=TEXT_ALONE, training=training(scale * 200, 3e-3))
        begin = Node("begin", 1, SMALL, WORDS, first, seed, labels={"family": "adapted", "role": "start"})
        whole = Lesson(
            (taught,),
            teacher=teacher.key,
            start_from=begin.key,
            objective=Objective(),
            training=training(steps, 3e-3),
        )
        student = Node("all-weights", 2, SMALL, WORDS, whole, seed, labels={"family": "adapted", "role": "student"})
        nodes += [begin, student]
        for name, adapters in ADAPTERS.items():
            # Adapters take a larger learning rate; docs/lessons.md has what others gave.
            lesson = change(whole, adapters=adapters, training=training(steps, 1e-2))
            nodes.append(change(student, name=name, lesson=lesson))
        for name, how in QUANTIZATION.items():
            model = change(SMALL, quantization=how)
            nodes.append(change(student, name=f"{name}-aware", model=model))
            # One step at a learning rate of zero: the weights of the student above, in other types.
            as_it_is = change(whole, start_from=student.key, training=training(1, 0.0))
            nodes.append(change(student, name=f"{name}-rounded", generation=3, model=model, lesson=as_it_is))
    evaluation = Evaluation(text=Text(BIBLE, split="test"), real=Text(BIBLE), write_tokens=0, contexts=500)
    return Lineage("adapted-students", tuple(nodes), evaluation, __doc__.partition("\n")[0])
