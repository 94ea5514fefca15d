"""Inside the teacher: what a student gains where its layers are held against its teacher's, beside the scores.

What     On the Bible in Basic English: a transformer teacher of four layers, and students of two, half as wide, that
         learn from its scores on two per cent of the text: from the scores alone (control), and with one thing inside
         the teacher beside them, each with weight 1: its states by mean squared error and by cosine (layers spread
         evenly), the relations of queries, keys and values in its last layer, and its last states told apart by
         contrast. The mean squared error is there with weight 0.02 too, at which it begins as large as the others.
Why      Romero et al. 2015 (FitNets), Sanh et al. 2019 (DistilBERT), Wang et al. 2021 (MiniLMv2), Tian et al. 2020
         (CRD): each found that its own signal helps a small student. Here they stand side by side, on one text, with
         one optimizer and the same steps.
Command  epigone run configs/inside.py
Cost     Measured: three minutes on two cores.
Expect   Held-out perplexity of three seeds: scores alone 78 to 92, light mean squared error 70 to 72, cosine 70 to 79,
         contrast 78 to 80, relations 84 to 85, mean squared error of weight 1 148 to 149. The teacher has 40.
"""

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import BPE
from epigone.lessons.hidden import hidden_cosine, hidden_mse
from epigone.lessons.inner import Match, evenly, last
from epigone.lessons.match_kinds import Contrast, Relations, States
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
PIECES = TrainedTokenizer(BPE(vocab_size=1_024), Text(BIBLE))

LARGE = DecoderConfig(layers=4, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=64, heads=2, max_length=128)

WAYS: dict[str, tuple[Match, ...]] = {
    "scores": (),
    "mse": (Match(States(hidden_mse), layers=evenly),),
    "mse-light": (Match(States(hidden_mse), layers=evenly, weight=0.02),),
    "cosine": (Match(States(hidden_cosine), layers=evenly),),
    "relations": (Match(Relations(heads=4), layers=last),),
    "contrast": (Match(Contrast(size=64), layers=last),),
}
"""What of the teacher's inside each of the students learns beside its scores."""


def lineage(seeds: int = 3, steps: int = 150, scale: float = 1.0) -> Lineage:
    """A teacher, and for each seed a student a way.

    Args:
        seeds: repetitions of every recipe whose spread the report gives, each on its own text, at most 7.
        steps: training steps of every student.
        scale: factor on the training steps of the teacher.
    """

    def training(steps: float, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(steps)), batch_size=8, sequence_length=128, optimizer=optimizer)

    alone = Lesson((Text(BIBLE),), objective=TEXT_ALONE, training=training(scale * 400, 4e-3))
    teacher = Node("teacher", 0, LARGE, PIECES, alone, labels={"family": "inside", "role": "teacher"})
    nodes = [teacher]
    for seed in range(seeds):
        crumbs = (Text(BIBLE, skip=30_000 * seed, tokens=30_000),)
        for name, inner in WAYS.items():
            objective, lessons = Objective(inner=inner), training(steps, 4e-3)
            lesson = Lesson(crumbs, teacher=teacher.key, objective=objective, training=lessons)
            role = "student" if inner else "control"
            nodes.append(Node(name, 1, SMALL, PIECES, lesson, seed, labels={"family": "inside", "role": role}))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=30_000),
        real=Text(BIBLE),
        write_tokens=2_000,
        contexts=500,
    )
    return Lineage("inside", tuple(nodes), evaluation, __doc__.partition("\n")[0])
