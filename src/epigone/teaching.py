"""The teachers of a node: what fits it, how they are asked, and what was kept of their scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from epigone.data.packing import Rows
from epigone.data.token_bytes import TokenBytes
from epigone.errors import UserError
from epigone.identity import fingerprint
from epigone.lineage import Node, Written
from epigone.materials import Materials, fill, longest
from epigone.models.ngram import NGram
from epigone.processes import wait
from epigone.training.config import Hardware
from epigone.view import View


def check_teacher(node: Node, materials: Materials) -> None:
    """Refuse teachers that are missing, not needed, or of another tokenizer, before anything is grown."""
    from epigone.lessons.alignment import aligns, name_of
    from epigone.teachers import check_inside, check_kept, check_needed
    from epigone.teachers.ensemble import Ensemble
    from epigone.teachers.mean_teacher import check_mean_teacher
    from epigone.training.on_policy import TEXT_ONLY, check_on_policy

    lesson = node.lesson
    check_needed(lesson.objective, lesson.mean_teacher or bool(lesson.teachers))
    if lesson.mean_teacher:
        check_mean_teacher(lesson.objective, lesson.training.ema_decay)
    if lesson.scores and len(lesson.teachers) != 1:
        whose = "of several teachers" if lesson.teachers else "of nobody"
        raise UserError(f"node '{node.key}' says which scores are kept, and {whose}: name one teacher")
    if lesson.ensemble or len(lesson.teachers) > 1:
        (lesson.ensemble or Ensemble()).check(lesson.teachers, len(lesson.text))
    check_kept(lesson.objective, lesson.scores)
    models = [materials.store.lineage[key].model for key in lesson.teachers]
    aligned = lesson.objective.needs_teacher and aligns(lesson.objective.divergence)
    decodes = len(models) == 1 and not isinstance(models[0], NGram) and not aligned
    check_on_policy(lesson.on_policy or TEXT_ONLY, lesson.objective, decodes if models else None)
    if aligned and (lesson.scores or lesson.ensemble or len(models) > 1):
        raise UserError(
            f"node '{node.key}': {name_of(lesson.objective.divergence)} takes one teacher beside the student, which "
            "reads every batch in its own tokens: leave out scores, ensemble and further teachers"
        )
    for key in lesson.teachers:
        _check_tokenizers(node, materials.store.lineage[key], materials, aligned)
    if hasattr(lesson.scores, "policy"):
        for source in lesson.text:
            if isinstance(source, Written):
                _check_whole(node, longest(materials.store.lineage[source.by], source.max_length))
    if lesson.objective.inner:
        shown = materials.store.lineage[lesson.teachers[0]] if decodes and lesson.scores is None else None
        check_inside(lesson.objective, _sizes(node, materials), _sizes(shown, materials) if shown else None)


def _check_whole(node: Node, tokens: int) -> None:
    """Refuse texts that are cut over rows: a prompt box reads each as one, and shows its scores so."""
    if tokens >= (rows := node.lesson.training.sequence_length):
        raise UserError(
            f"node '{node.key}' learns what a prompt box shows of whole texts, and rows of {rows} cut one of {tokens}: "
            f"raise sequence_length above {tokens}, or take shorter texts (max_length)"
        )


def _sizes(node: Node, materials: Materials) -> Any:
    return fill(node.model, materials.tokenizer(node.tokenizer)).sizes


def _check_tokenizers(node: Node, teacher: Node, materials: Materials, aligned: bool) -> None:
    theirs, ours = (materials.tokenizer(config) for config in (teacher.tokenizer, node.tokenizer))
    if aligned:
        for tokenizer in (theirs, ours):
            TokenBytes(tokenizer)
    elif theirs.vocabulary != ours.vocabulary:
        raise UserError(
            f"node '{node.key}' and its teacher '{teacher.key}' read different tokenizers, '{ours.name}' of "
            f"{ours.size} tokens and '{theirs.name}' of {theirs.size}: give both one, or take an objective that aligns "
            "them by bytes (likelihood_matching, common_tokens or uld of epigone.lessons.alignment)"
        )


def teacher_of(
    node: Node, materials: Materials, rows: Sequence[Rows], hardware: Hardware, view: View
) -> tuple[Any, dict[str, Any]]:
    """Whose scores are learned, checked against the student, and what the record tells of asking it.

    Where a lesson keeps scores, those of the rows are on disk afterwards.
    """
    from epigone.lessons.alignment import aligns
    from epigone.teachers import check_compatible
    from epigone.teachers.mean_teacher import MeanTeacher

    lesson = node.lesson
    own = materials.tokenizer(node.tokenizer)
    if lesson.mean_teacher:
        return MeanTeacher(fill(node.model, own), own.identity, own.name), {}
    if not lesson.teachers:
        return None, {}
    asked: dict[str, Any] = {}
    if lesson.scores is not None:
        teacher, asked = ask(node, materials, rows, hardware, view)
    elif lesson.ensemble or len(lesson.teachers) > 1:
        teacher = _ensemble(node, materials, rows, hardware)
    else:
        teacher = _in_memory(lesson.teachers[0], materials, hardware)
    if aligns(lesson.objective.divergence):
        from epigone.teachers.other_tokenizer import ROOM, fitted

        view.stage("align tokens")
        theirs = materials.tokenizer(materials.store.lineage[lesson.teachers[0]].tokenizer)
        teacher, asked["alignment"] = fitted(teacher, theirs, own, rows, ROOM if lesson.on_policy else 1.0)
    for one in getattr(teacher, "members", [teacher]):
        check_compatible(
            lesson.objective,
            one,
            vocab_size=fill(node.model, own).vocab_size,
            tokenizer_identity=own.vocabulary,
            tokenizer_name=own.name,
        )
    return teacher, asked


def ask(
    node: Node, materials: Materials, rows: Sequence[Rows], hardware: Hardware, view: View
) -> tuple[Any, dict[str, Any]]:
    """The teacher of a lesson that keeps scores, when all that the lesson wants is on disk, and what is recorded."""
    from epigone.training.labelling import label

    lesson, cached = node.lesson, _cached(node, materials)
    if hasattr(lesson.scores, "policy"):
        texts = [materials.documents(source, node.tokenizer) for source in lesson.text]
        _check_whole(node, max(len(document) for documents in texts for document in documents))
    batch_size, key = lesson.training.batch_size, lesson.teachers[0]
    view.stage("label", sum(-(-len(source) // batch_size) for source in rows))
    done = label(cached, lambda: _in_memory(key, materials, hardware), rows, batch_size, hardware, on_step=view.step)
    wait(f"{node.key} is labelled")
    cached.files.refresh()
    tokens = sum(source.targets for source in rows)
    told = {"tokens": tokens, "asked": done.tokens, "bytes": done.size, "seconds": done.seconds}
    asked: dict[str, Any] = {"scores": told}
    if done.tokens:
        asked["flops"] = done.tokens * _in_memory(key, materials).flops_per_token(lesson.training.sequence_length)
    return cached, asked


def _in_memory(key: str, materials: Materials, hardware: Hardware = Hardware()) -> Any:
    """A teacher beside the student. Weights that are not at hand go from the disk to where they belong on the mesh."""
    import jax

    from epigone.teachers import in_memory
    from epigone.training.checkpoint import load_params

    parent = materials.store.lineage[key]
    tokenizer = materials.tokenizer(parent.tokenizer)
    if isinstance(parent.model, NGram):
        counts: Any = materials.model(parent)
        return in_memory.NGramTeacher(counts, tokenizer.vocabulary, tokenizer.name)
    # What one process has at hand another may not have, and all must read together.
    kept: Any = materials.kept(parent) if jax.process_count() == 1 else None
    return in_memory.DecoderTeacher(
        fill(parent.model, tokenizer),
        kept.params if kept else partial(load_params, materials.store.weights(parent)),
        tokenizer.vocabulary,
        tokenizer.name,
        tokens=tokenizer.tokens,
        sharding=hardware.teacher,
    )


def _ensemble(node: Node, materials: Materials, rows: Sequence[Rows], hardware: Hardware) -> Any:
    from epigone.teachers.ensemble import Ensemble, EnsembleTeacher, routes_of

    keys, how = node.lesson.teachers, node.lesson.ensemble or Ensemble()
    routes = None if how.route is None else routes_of(rows, [keys.index(key) for key in how.route])
    return EnsembleTeacher([_in_memory(key, materials, hardware) for key in keys], how, routes)


def _cached(node: Node, materials: Materials) -> Any:
    """What was kept of the teacher's scores, in a folder of its own for each teacher, temperature and kind."""
    from epigone.teachers.cached import CachedTeacher
    from epigone.teachers.kept import HiddenStates

    lesson, store = node.lesson, materials.store
    parent = store.lineage[lesson.teachers[0]]
    tokenizer = materials.tokenizer(parent.tokenizer)
    states, temperature = isinstance(lesson.scores, HiddenStates), lesson.objective.temperature
    temperature = 1.0 if states else temperature
    whole = tokenizer.size if isinstance(parent.model, NGram) else fill(parent.model, tokenizer).vocab_size
    size = min(whole, fill(node.model, materials.tokenizer(node.tokenizer)).vocab_size)
    wanted = [store.lineage.identities[parent.key], tokenizer.identity, lesson.scores, temperature]
    # What a student with fewer rows cannot predict is left out of the scores before they are chosen.
    name = fingerprint(wanted if states or size == whole else [*wanted, size])
    return CachedTeacher(
        lesson.scores,
        store.data / "scores" / name,
        vocab_size=size,
        temperature=temperature,
        tokenizer_identity=tokenizer.vocabulary,
        tokenizer_name=tokenizer.name,
        tokens=tokenizer.tokens,
        **(_in_memory(parent.key, materials).head_alone() if states else {}),
    )
