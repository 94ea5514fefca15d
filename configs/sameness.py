"""Sameness: how many independent teachers does a population need to stay diverse?

What     Populations of models of which each learns some real text of its own and some that a teacher wrote. How alike
         they answer, err and write is measured against the number of teachers, the dose of teacher text, the number of
         models, their capacity, and rounds in which they copy each other. A population in which everybody has another
         teacher, and one without any, are the controls.
Why      Bommasani et al. 2022 (arXiv 2211.13972), Kim et al. 2025 (2506.07962) and Goel et al. 2025 (2502.04313) found
         that models err alike; what sharing few teachers does to a whole population was not measured.
Command  epigone run configs/sameness.py
Cost     About eight minutes on two CPU cores.
Expect   With one teacher, more of its text makes the population worth fewer models, though each reads other texts of
         it. Every doubling of the teachers gives some of that back.
"""

from dataclasses import replace

from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Population, Text, TrainedTokenizer, Written
from epigone.models.ngram import NGram
from epigone.models.smoothing import mle

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))
VALIDATION = Text(BIBLE, split="validation", tokens=10_000)

TEACHERS, DOSES = (1, 2, 4, 8), (0.25, 0.5, 0.75, 1.0)
USUAL = {"teachers": 1, "dose": 0.5, "models": 8, "capacity": 3, "rounds": 0}
"""What is held where another factor is looked at."""


def lineage(seeds: int = 3, teacher_tokens: int = 40_000, tokens: int = 20_000) -> Lineage:
    """All populations, each `seeds` times.

    Args:
        seeds: repetitions; each reads other parts of the corpus.
        teacher_tokens: real text of each teacher.
        tokens: text of each member, its own and its teacher's.
    """
    kinds = [USUAL | {"dose": 0.0}, *(USUAL | {"teachers": k, "dose": d} for k in TEACHERS for d in DOSES)]
    kinds += [USUAL | {"models": m} for m in (2, 4, 16)]
    kinds += [USUAL | {"capacity": c} for c in (1, 2, 4)]
    kinds += [USUAL | {"rounds": r} for r in (1, 2, 3)]
    most = max(TEACHERS) * teacher_tokens + 16 * tokens
    nodes: dict[str, Node] = {}
    populations: list[Population] = []
    for seed in range(seeds):
        start = seed * most % 250_000
        parts = [Text(BIBLE, skip=start + i * teacher_tokens, tokens=teacher_tokens) for i in range(max(TEACHERS))]
        teachers = [_counts(f"teacher{i}", part, seed=seed) for i, part in enumerate(parts)]
        nodes |= {teacher.key: teacher for teacher in teachers}
        for kind in kinds:
            own = start + max(TEACHERS) * teacher_tokens
            texts = [Text(BIBLE, skip=own + i * tokens, tokens=tokens) for i in range(int(kind["models"]))]
            grown = _population(kind, teachers[: int(kind["teachers"])], texts, seed)
            nodes |= {node.key: node for node in grown}
            populations.append(Population(_name(kind), tuple(n.key for n in grown[-len(texts) :]), kind, seed))
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=20_000), real=Text(BIBLE), write_tokens=8_000, contexts=400, samples=2
    )
    return Lineage("sameness", tuple(nodes.values()), evaluation, __doc__.partition("\n")[0], tuple(populations))


def _population(kind: dict[str, float], teachers: list[Node], texts: list[Text], seed: int) -> list[Node]:
    """The members of all rounds, the last round's at the end."""
    order, tokens = int(kind["capacity"]), texts[0].tokens or 0
    taught = round(kind["dose"] * tokens)
    grown: list[Node] = []
    authors: list[list[Node]] = [[teachers[i % len(teachers)]] for i in range(len(texts))]
    for number in range(int(kind["rounds"]) + 1):
        members = []
        for i, own in enumerate(texts):
            part = taught // len(authors[i])
            read = [Written(by=author.key, tokens=part, draw=i) for author in authors[i]] if taught else []
            real = [replace(own, tokens=tokens - taught)] if taught < tokens else []
            name = f"{_name(kind | {'rounds': 0})}-member{i}"
            members.append(_counts(name, *real, *read, order=order, generation=number + 1, seed=seed))
        grown += members
        # From now on everybody reads a little of everybody else.
        authors = [[other for other in members if other is not member] for member in members]
    return grown


def _counts(name: str, *text: Text | Written, order: int = 3, generation: int = 0, seed: int = 0) -> Node:
    lesson = Lesson(text=text, validation=VALIDATION)
    labels = {"family": "teachers" if name.startswith("teacher") else "members"}
    return Node(name, generation, NGram(order=order, writing=mle), WORDS, lesson, seed=seed, labels=labels)


def _name(kind: dict[str, float]) -> str:
    """Such as t1-d0.5-m8-c3-r0."""
    return "-".join(f"{name[0]}{value:g}" for name, value in kind.items())
