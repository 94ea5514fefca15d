"""The quickstart: copies of copies, dark knowledge, and what a larger teacher changes. All on a laptop.

What     Three small experiments on the Bible in Basic English (840,000 words, public domain, a PyPI package).
         1. A trigram model and ten generations, each trained on the text of the one before, under three data regimes.
         2. A transformer teacher; a smaller student that learns from its scores; the same student without a teacher.
         3. Transformers trained on their own text, and a small pupil of the large teacher's text.
Why      1. Shumailov et al. 2024 and Gerstgrasser et al. 2024: replacing data loses the tails, accumulating does not.
         2. Hinton et al. 2015: with a few per cent of the text, soft targets carry most of what hard targets lack.
         3. Kim & Rush 2016: a student can live on what a larger teacher writes.
Command  epigone run configs/quickstart.py
Cost     About four minutes and 2 GiB on two CPU cores.
Expect   Held-out perplexity at generation 10: accumulate < fresh share < replace. Student better than control.
"""

from dataclasses import replace as change
from functools import partial

from epigone import regimes
from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.families import chain, fan_out
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

LARGE = DecoderConfig(layers=2, model_size=128, heads=4, max_length=128)
SMALL = DecoderConfig(layers=2, model_size=96, heads=4, max_length=128)

PROMPTS = (
    "and the lord said to",
    "in the land of",
    "give ear to the words of my",
    "and they took the king and put him to",
    "he has a good",
    "let your heart be full of",
)


def lineage(seeds: int = 3, generations: int = 10, temperature: float = 2.0, scale: float = 1.0) -> Lineage:
    """Trigram generations, a distilled student against its control, transformer generations.

    Args:
        seeds: repetitions of every recipe whose spread the report gives, at most 7.
        generations: trigram generations after the first; transformers have 3 at most.
        temperature: divides teacher's and student's logits in distillation.
        scale: factor on the training steps of the transformers; less is faster and worse.
    """

    def transformer(name: str, model: DecoderConfig, text: Text | Written, steps: int, **labels: str) -> Node:
        large = model is LARGE
        training = Training(
            steps=max(1, round(scale * steps)),
            batch_size=8 if large else 4,
            sequence_length=128,
            optimizer=Optimizer(learning_rate=4e-3 if large else 3e-3, warmup_steps=20),
        )
        lesson = Lesson(text=(text,), objective=Objective(hard_weight=1.0), training=training)
        return Node(name, 0, model, WORDS, lesson, labels=labels)

    # 1. A small language model that knows only triplets of words, and the copies of its copies.
    nodes: list[Node] = []
    for seed in range(seeds):
        own = Text(BIBLE, skip=120_000 * seed, tokens=60_000)  # another part for every seed, with fresh text behind it
        counting = Lesson(text=(own,), validation=Text(BIBLE, split="validation"))
        root = Node("trigram", 0, NGram(order=3), WORDS, counting, seed=seed, labels={"family": "trigram"})
        nodes += [root, *chain(root, generations, regimes.replace, name="trigram-replace")]
        nodes += chain(root, generations, partial(regimes.fresh_share, share=0.1), name="trigram-fresh")
        nodes += chain(root, generations, regimes.accumulate, name="trigram-accumulate")

    # 2. Two per cent of the text: the student has the teacher's scores, the control has the text alone.
    teacher = transformer("teacher", LARGE, Text(BIBLE), 420, family="distillation", role="teacher")
    soft = Objective(divergence=forward_kl, temperature=temperature)
    controls = []
    for seed in range(seeds):
        crumbs = Text(BIBLE, skip=20_000 * seed, tokens=20_000)
        alone = transformer("control", SMALL, crumbs, 240, family="distillation", role="control")
        controls.append(change(alone, generation=1, seed=seed))
    students = [
        change(
            control,
            name="student",
            lesson=change(control.lesson, objective=soft),
            labels={**control.labels, "role": "student"},
        )
        for control in controls
    ]
    nodes += [teacher, *fan_out(teacher, students), *controls]

    # 3. Transformers on their own text; and a small pupil that reads what the large teacher writes.
    first = transformer("self", SMALL, Text(BIBLE, tokens=80_000), 180, family="transformer")
    nodes += [first]
    nodes += chain(first, min(3, generations), regimes.replace, name="self-replace")
    nodes += chain(first, min(3, generations), regimes.accumulate, name="self-accumulate")
    story = Written(by=teacher.key, tokens=80_000)
    nodes += [
        change(transformer("pupil", SMALL, story, 180, family="transformer", regime="larger teacher"), generation=1)
    ]

    evaluation = Evaluation(
        text=Text(BIBLE, split="test"),
        real=Text(BIBLE),
        write_tokens=10_000,
        contexts=500,
        prompts=PROMPTS,
        compare={"control": teacher.key},
    )
    return Lineage("quickstart", tuple(nodes), evaluation, __doc__.partition("\n")[0])
