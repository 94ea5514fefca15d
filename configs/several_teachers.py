"""Several teachers of one student: how they are made one, against each of them alone.

What     Two transformer teachers, of which one has read the Bible in Basic English and one the American Standard
         Version. Students of half their size read a little of both, and learn from one of the two, from both at every
         token (means of probabilities and of logits; weighed by confidence or by the likelihood of the text), from the
         one that knows each text (routed), and from the text alone (control).
Why      Hinton et al. 2015 average what their teachers say. Teachers that know different things should not count the
         same everywhere: who speaks where is half of an ensemble.
Command  epigone run configs/several_teachers.py
         epigone evaluate NODE --run runs/several-teachers --on asv     # the other text
Cost     Measured: 20 nodes, four and a half minutes on two cores.
Expect   Held-out perplexity of the two texts: routed 79 and 111, by likelihood 79 and 112, mean of probabilities 80 and
         117, mean of logits 81 and 190; each teacher alone is best on its own text and worst on the other's.
"""

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import BPE
from epigone.lessons.ensemble import by_confidence, by_likelihood, mean_of_logits
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.teachers.ensemble import Ensemble
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BASIC, STANDARD = Embedded("bbe", unit="verse"), Embedded("asv", unit="verse")
PIECES = TrainedTokenizer(BPE(2048), Text(STANDARD))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=64, heads=4, max_length=128)

BOTH = ("basic@0", "standard@0")
"""The teachers, in the order of the texts that they know."""

WAYS: dict[str, tuple[str | tuple[str, ...] | None, Ensemble | None]] = {
    "control": (None, None),
    "basic-alone": (BOTH[0], None),
    "standard-alone": (BOTH[1], None),
    "probabilities": (BOTH, Ensemble()),
    "logits": (BOTH, Ensemble(combine=mean_of_logits)),
    "weighted": (BOTH, Ensemble(weights=(3.0, 1.0))),
    "confident": (BOTH, Ensemble(weigh=by_confidence)),
    "likely": (BOTH, Ensemble(weigh=by_likelihood)),
    "routed": (BOTH, Ensemble(route=BOTH)),
}
"""Teachers of each student, and how they are made one."""


def lineage(seeds: int = 2, steps: int = 300, tokens: int = 80_000, scale: float = 1.0) -> Lineage:
    """Two teachers, and a student for every way of asking them.

    Args:
        seeds: repetitions of every student, each with parts of the texts of its own, at most 5.
        steps: training steps of each student.
        tokens: of each of the two texts that each student reads.
        scale: factor on the training steps of the teachers; less is faster and worse.
    """

    def training(steps: float, batch_size: int, rate: float) -> Training:
        optimizer = Optimizer(learning_rate=rate, warmup_steps=20)
        return Training(max(1, round(steps)), batch_size, sequence_length=128, optimizer=optimizer)

    nodes = []
    for key, corpus in zip(BOTH, (BASIC, STANDARD), strict=True):
        alone = Lesson((Text(corpus),), objective=TEXT_ALONE, training=training(scale * 500, 8, 4e-3))
        nodes.append(Node(key.partition("@")[0], 0, LARGE, PIECES, alone, labels={"role": "teacher"}))
    for seed in range(seeds):
        texts = tuple(Text(corpus, skip=tokens * seed, tokens=tokens) for corpus in (BASIC, STANDARD))
        for name, (teacher, ensemble) in WAYS.items():
            lesson = Lesson(
                texts,
                weights=(0.5, 0.5),
                teacher=teacher,
                ensemble=ensemble,
                objective=Objective() if teacher else TEXT_ALONE,
                training=training(steps, 4, 3e-3),
            )
            labels = {"role": "student" if teacher else "control", "teachers": name}
            nodes.append(Node(name, 1, SMALL, PIECES, lesson, seed=seed, labels=labels))
    evaluation = Evaluation(
        text=Text(BASIC, split="test"),
        real=Text(BASIC),
        write_tokens=10_000,
        contexts=1_000,
        compare=dict.fromkeys(("control", "standard-alone"), BOTH[0]),
    )
    return Lineage("several-teachers", tuple(nodes), evaluation, __doc__.partition("\n")[0])
