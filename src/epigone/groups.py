"""Which nodes of a lineage one program can train together: those of one shape that do not wait for each other."""

from collections.abc import Sequence
from typing import Any

from epigone.errors import UserError
from epigone.identity import fingerprint
from epigone.lineage import Node
from epigone.models.ngram import NGram
from epigone.processes import several
from epigone.store import Store


def groups(nodes: Sequence[Node], store: Store, most: int) -> list[list[Node]]:
    """Nodes in groups of at most `most`, such that what a group waits for is in groups before it.

    A group depends on the lineage alone, not on what is done: it may hold others beside these nodes, which are done.

    Args:
        nodes: what is to be done, parents first.
        store: of the run.
        most: 1 leaves the order as it is.

    Raises:
        UserError: several processes train one model already.
    """
    if most == 1:
        return [[node] for node in nodes]
    if several():
        raise UserError(f"hardware: together={most} is for small models in one process, and this is one of several")
    order, depths = store.lineage.order, dict[str, int]()
    alike: dict[Any, list[Node]] = {}
    for node in order:
        depths[node.key] = 1 + max((depths[key] for key, _ in node.parents), default=-1)
        alike.setdefault((depths[node.key], _shape(node)), []).append(node)
    parts = [members[i : i + most] for members in alike.values() for i in range(0, len(members), most)]
    wanted = {node.key for node in nodes}
    kept = [part for part in parts if any(node.key in wanted for node in part)]
    return sorted(kept, key=lambda part: depths[part[0].key])  # stable: otherwise as they were given


def _shape(node: Node) -> str:
    """Equal for nodes that one program can train; a node that is trained alone has its own."""
    lesson = node.lesson
    alone = (
        isinstance(node.model, NGram)
        or lesson.source
        or lesson.adapters
        or lesson.on_policy
        or lesson.mean_teacher
        or lesson.scores
        or lesson.ensemble
        or len(lesson.teachers) > 1
        or lesson.objective is None
        or lesson.objective.inner
        or _aligns(lesson.objective)
    )
    parts = [node.model, node.tokenizer, lesson.training, lesson.objective, lesson.teachers]
    return node.key if alone else fingerprint(parts)


def _aligns(objective: Any) -> bool:
    from epigone.lessons.alignment import aligns

    return objective.needs_teacher and aligns(objective.divergence)
