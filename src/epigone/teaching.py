"""The teacher of a node: what fits it, how it is asked, and what was kept of its scores."""

from collections.abc import Sequence
from typing import Any

from epigone.data.packing import Rows
from epigone.errors import UserError
from epigone.identity import fingerprint
from epigone.lineage import Node
from epigone.materials import Materials, fill
from epigone.models.ngram import NGram
from epigone.processes import wait
from epigone.training.config import Hardware
from epigone.view import View


def check_teacher(node: Node, materials: Materials) -> None:
    """Refuse a teacher that is missing, not needed, or of another tokenizer, before anything is grown."""
    from epigone.teachers import check_kept, check_needed

    lesson = node.lesson
    check_needed(lesson.objective, lesson.teacher is not None)
    if lesson.teacher is None:
        if lesson.scores:
            raise UserError(f"node '{node.key}' says which scores are kept and of nobody: name its teacher")
        return
    check_kept(lesson.objective, lesson.scores)
    teacher = materials.store.lineage[lesson.teacher]
    theirs, ours = (materials.tokenizer(config) for config in (teacher.tokenizer, node.tokenizer))
    if theirs.identity != ours.identity:
        raise UserError(
            f"node '{node.key}' and its teacher '{teacher.key}' read different tokenizers, '{ours.name}' and "
            f"'{theirs.name}': give both one tokenizer"
        )


def teacher_of(
    node: Node, materials: Materials, rows: Sequence[Rows], hardware: Hardware, view: View
) -> tuple[Any, dict[str, Any]]:
    """The node whose scores are learned, checked against the student, and what the record tells of asking it.

    Where a lesson keeps scores, those of the rows are on disk afterwards.
    """
    from epigone.teachers import check_compatible

    lesson = node.lesson
    if lesson.teacher is None:
        return None, {}
    asked: dict[str, Any] = {}
    if lesson.scores is None:
        teacher = _in_memory(node, materials)
    else:
        teacher, asked = ask(node, materials, rows, hardware, view)
    own = materials.tokenizer(node.tokenizer)
    check_compatible(
        lesson.objective,
        teacher,
        vocab_size=fill(node.model, own).vocab_size,
        tokenizer_identity=own.identity,
        tokenizer_name=own.name,
    )
    return teacher, asked


def ask(
    node: Node, materials: Materials, rows: Sequence[Rows], hardware: Hardware, view: View
) -> tuple[Any, dict[str, Any]]:
    """The teacher of a lesson that keeps scores, when all that the lesson wants is on disk, and what is recorded."""
    from epigone.training.labelling import label

    lesson, cached = node.lesson, _cached(node, materials)
    batches = sum(-(-len(source) // lesson.training.batch_size) for source in rows)
    view.stage("label", batches)
    done = label(
        cached, lambda: _in_memory(node, materials), rows, lesson.training.batch_size, hardware, on_step=view.step
    )
    wait(f"{node.key} is labelled")
    cached.files.refresh()
    tokens = sum(source.targets for source in rows)
    told = {"tokens": tokens, "asked": done.tokens, "bytes": cached.files.size, "seconds": done.seconds}
    asked = {"scores": told}
    if done.tokens:
        asked["flops"] = done.tokens * _in_memory(node, materials).flops_per_token(lesson.training.sequence_length)
    return cached, asked


def _in_memory(node: Node, materials: Materials) -> Any:
    """The teacher beside the student."""
    from epigone.teachers import in_memory

    parent = materials.store.lineage[node.lesson.teacher or ""]
    model: Any = materials.model(parent)
    tokenizer = materials.tokenizer(parent.tokenizer)
    if isinstance(parent.model, NGram):
        return in_memory.NGramTeacher(model, tokenizer.identity, tokenizer.name)
    return in_memory.DecoderTeacher(model.config, model.params, tokenizer.identity, tokenizer.name)


def _cached(node: Node, materials: Materials) -> Any:
    """What was kept of the teacher's scores, in a folder of its own for each teacher, temperature and kind."""
    from epigone.teachers.cached import CachedTeacher
    from epigone.teachers.kept import HiddenStates

    lesson, store = node.lesson, materials.store
    parent = store.lineage[lesson.teacher or ""]
    tokenizer = materials.tokenizer(parent.tokenizer)
    states, temperature = isinstance(lesson.scores, HiddenStates), lesson.objective.temperature
    temperature = 1.0 if states else temperature
    name = fingerprint([store.lineage.identities[parent.key], tokenizer.identity, lesson.scores, temperature])
    return CachedTeacher(
        lesson.scores,
        store.data / "scores" / name,
        vocab_size=tokenizer.size if isinstance(parent.model, NGram) else fill(parent.model, tokenizer).vocab_size,
        temperature=temperature,
        tokenizer_identity=tokenizer.identity,
        tokenizer_name=tokenizer.name,
        **(_in_memory(node, materials).head_alone() if states else {}),
    )
