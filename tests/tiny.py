"""Lineages small enough for tests: a few hundred sentences, models of a few thousand weights, a second or two."""

import contextlib
import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from epigone.data import embedded
from epigone.lineage import Lineage, Node
from epigone.models.config import DecoderConfig

CONFIG = '''
"""A tiny lineage: two generations of trigrams, a teacher, a student, its control, and one that reads."""

from dataclasses import replace as change

from epigone import regimes
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.lessons.objective import Objective
from epigone.families import chain, fan_out
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

CORPUS = TextFiles("{pattern}")
WORDS = TrainedTokenizer(Words(), Text(CORPUS))
MODEL = DecoderConfig(layers=1, model_size=16, heads=2, max_length=32)


def lineage(steps: int = 8, generations: int = 2) -> Lineage:
    """A tiny lineage.

    Args:
        steps: training steps of every transformer.
        generations: trigram generations after the first.
    """
    training = Training(steps=steps, batch_size=4, sequence_length=16, optimizer=Optimizer(learning_rate=1e-2))
    few = Text(CORPUS, tokens=600)
    trigram = Node("trigram", 0, NGram(), WORDS, Lesson((few,), validation=Text(CORPUS, "validation")))
    alone = Lesson((Text(CORPUS),), objective=Objective(hard_weight=1.0), training=training)
    teacher = Node("teacher", 0, MODEL, WORDS, alone, labels={{"role": "teacher"}})
    student = Node("student", 1, MODEL, WORDS, change(alone, objective=Objective(temperature=2.0)))
    reader = Node("reader", 1, MODEL, WORDS, change(alone, text=(Written("teacher@0", tokens=400, max_length=16),)))
    copies = chain(trigram, generations, regimes.replace, name="copy")
    nodes = [trigram, *copies, teacher, *fan_out(teacher, [student]), reader]
    evaluation = Evaluation(Text(CORPUS, "test"), Text(CORPUS), write_tokens=200, contexts=50, prompts=("the cat",))
    return Lineage("tiny", tuple(nodes), evaluation)
'''

NODES = ["trigram@0", "copy@1", "copy@2", "teacher@0", "student@1", "reader@1"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of a small grammar, enough of a language to be learned in a few steps."""
    draw = random.Random(seed)
    who, what = ["cat", "dog", "king", "bird", "child"], ["sees", "hears", "follows", "likes"]
    how, where = ["old", "small", "loud", "good"], ["in the house", "by the river", "at night", ""]
    pick = draw.choice
    return [
        f"The {pick(how)} {pick(who)} {pick(what)} the {pick(who)} {pick(where)}".strip() + "." for _ in range(count)
    ]


def write_corpus(folder: Path, count: int = 600) -> Path:
    """A text file with one sentence a paragraph."""
    path = folder / "corpus.txt"
    path.write_text("\n\n".join(sentences(count)))
    return path


def write_config(folder: Path, source: str = CONFIG) -> Path:
    """The config file over a corpus in the same folder."""
    path = folder / "tiny.py"
    path.write_text(source.format(pattern=write_corpus(folder)))
    return path


@contextlib.contextmanager
def few_verses(every: int = 10) -> Iterator[None]:
    """Of embedded texts one verse in so many: preparing, encoding, indexing and packing the whole takes seconds."""
    whole = embedded.verses
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embedded, "verses", lambda text: whole(text)[::every])
        yield


class Silent:
    """A view that shows nothing."""

    def start(self, node: Node) -> None: ...

    def stage(self, name: str, steps: int | None = None) -> None: ...

    def step(self, report: object) -> None: ...

    def finish(self, node: Node, record: dict) -> None: ...


def few_populations(whole: Lineage, names: Collection[str]) -> Lineage:
    """The populations of these names, and what is behind their members."""
    kept = tuple(population for population in whole.populations if population.name in names)
    wanted = {key for population in kept for key in population.members}
    waiting = list(wanted)
    while waiting:
        parents = {key for key, _ in whole[waiting.pop()].parents} - wanted
        wanted |= parents
        waiting += parents
    return replace(whole, nodes=tuple(node for node in whole.nodes if node.key in wanted), populations=kept)


def shrunk(lineage: Lineage, **evaluation: object) -> Lineage:
    """The same lessons for models of one layer on short rows, measured on a little text."""

    def small(node: Node) -> Node:
        training = replace(node.lesson.training, batch_size=2, sequence_length=24) if node.lesson.training else None
        model = node.model
        if isinstance(model, DecoderConfig):
            model = replace(model, layers=1, model_size=16, heads=2)
        return replace(node, model=model, lesson=replace(node.lesson, training=training))

    text = replace(lineage.evaluation.text, tokens=500)
    measured = {"text": text, "write_tokens": 100, "contexts": 10, "samples": 1} | evaluation
    return replace(lineage, nodes=tuple(map(small, lineage.nodes)), evaluation=replace(lineage.evaluation, **measured))
