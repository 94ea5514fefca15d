"""Lineages in one line each: repetitions, fan-outs, populations, chains of generations."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from epigone.errors import UserError
from epigone.lineage import Lesson, Node, Text, Written


def repeat(node: Node, seeds: int) -> tuple[Node, ...]:
    """The same recipe with seeds 0 to seeds - 1: the spread of a result."""
    return tuple(dataclasses.replace(node, seed=seed) for seed in range(seeds))


def fan_out(teacher: Node | Sequence[Node], students: Iterable[Node]) -> tuple[Node, ...]:
    """Every student learns from the scores of one teacher, or of several at once, one generation after them."""
    teachers = [teacher] if isinstance(teacher, Node) else list(teacher)
    keys = teachers[0].key if isinstance(teacher, Node) else tuple(one.key for one in teachers)
    return tuple(
        dataclasses.replace(
            student,
            generation=max(one.generation for one in teachers) + 1,
            lesson=dataclasses.replace(student.lesson, teacher=keys),
        )
        for student in students
    )


def population(student: Node, teachers: Sequence[Node], members: int) -> tuple[Node, ...]:
    """`members` students, dealt to the teachers in turn (member i to teacher i mod k), each with a seed of its own."""
    return tuple(
        fan_out(teachers[member % len(teachers)], [dataclasses.replace(student, seed=member)])[0]
        for member in range(members)
    )


def born_again(teacher: Node, generations: int, objective: Any, *, name: str = "born-again") -> tuple[Node, ...]:
    """Generations of one size (Furlanello et al. 2018): each starts fresh and learns from the scores of the one before.

    Model, text and training are the teacher's. `objective` says how much the text itself counts beside the scores
    (`hard_weight`). Each generation has initial weights and an order of batches of its own (`Lesson.initialisation`).
    Returned without the teacher; `fan_out([teacher, *chain], ...)` makes a student of them all.

    Raises: UserError for a teacher that was not trained here.
    """
    if teacher.lesson.training is None:
        raise UserError(f"a born-again chain trains its teacher's model anew, and '{teacher.key}' was not trained here")
    nodes = [teacher]
    for number in range(1, generations + 1):
        lesson = Lesson(
            teacher.lesson.text,
            weights=teacher.lesson.weights,
            objective=objective,
            training=teacher.lesson.training,
            initialisation=teacher.lesson.initialisation + number,
        )
        labels = {**teacher.labels, "role": "student"}
        nodes += fan_out(nodes[-1], [dataclasses.replace(teacher, name=name, lesson=lesson, labels=labels)])
    return tuple(nodes[1:])


def chain(
    root: Node,
    generations: int,
    regime: Any,
    *,
    name: str,
    writing: Written | None = None,
    successors: Sequence[Node] = (),
    warm: bool = False,
    scores: bool = False,
) -> tuple[Node, ...]:
    """Generations after `root`, each taught by text as `regime` mixes it; returned without the root.

    Args:
        root: learned real text of a known size; its seed and its tokenizer are those of all.
        generations: how many.
        regime: a function of `epigone.regimes`: (real text, [text written by generation 0, 1, ...]) -> sources of the
            next.
        name: of the generations.
        writing: how the text is sampled (its `by` is replaced, and its `tokens` when 0): by default as many tokens as
            the root's real text, at temperature 1. Its judge and its prompts stay.
        successors: nodes of which the generations are made in turn, without their text: smaller, larger or of another
            kind than the root. By default the root itself.
        warm: each begins with the weights of the one before, else fresh.
        scores: each learns from the scores of the one before too, as the objective of its lesson says.

    Raises: UserError for a root that learned from another node, or a text of unknown size.
    """
    real = root.lesson.text[0]
    if not isinstance(real, Text):
        raise UserError(f"a chain starts at a node that learned real text, and '{root.key}' learned from another node")
    writing = writing or Written(by="", tokens=0)
    if not (writing.tokens or real.tokens):
        raise UserError(f"say how many tokens each generation writes: '{root.key}' takes its whole corpus")
    nodes, recipes = [root], successors or (root,)
    for generation in range(1, generations + 1):
        written = [dataclasses.replace(writing, by=n.key, tokens=writing.tokens or real.tokens or 0) for n in nodes]
        recipe, before = recipes[(generation - 1) % len(recipes)], nodes[-1].key
        lesson = dataclasses.replace(
            recipe.lesson,
            text=regime(real, written),
            start_from=before if warm else recipe.lesson.start_from,
            teacher=before if scores else recipe.lesson.teacher,
        )
        labels = {**root.labels, "regime": regime_name(regime)} | dict(recipe.labels if successors else {})
        made = {"name": name, "generation": generation, "model": recipe.model, "lesson": lesson, "labels": labels}
        nodes.append(dataclasses.replace(root, **made))
    return tuple(nodes[1:])


def regime_name(regime: Any) -> str:
    """A regime's name in plain words, also when it is a partial: `fresh_share` -> 'fresh share'."""
    return getattr(regime, "func", regime).__name__.replace("_", " ")
