"""What growing a lineage will take, said before it is done."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from epigone.errors import UserError
from epigone.lineage import Lineage, Node, Text, TrainedTokenizer
from epigone.materials import Materials, TokenizerConfig, longest
from epigone.models.ngram import NGram
from epigone.storage.folders import is_whole
from epigone.store import Store, kind
from epigone.writing import drawn_tokens, writing_flops

COUNTING_BYTES_PER_TOKEN = 400
"""Measured high-water mark of fitting a trigram: three orders of sorted 64-bit keys and their counts."""


@dataclass(frozen=True)
class PlannedNode:
    """One row of the plan. What cannot be known before is None.

    Attributes:
        key: the node.
        kind: what sort of model it is.
        done: whether its record exists.
        parents: keys of its parents.
        parameters: weights of the model.
        tokens: tokens that it learns from, counted once a pass (an upper bound: packing leaves some padding).
        flops: floating-point operations of training, of the teacher's scores, of writing own texts, and of the texts
            that others write and judge for it, where no node before it reads them too.
        memory: estimated bytes while it is grown.
    """

    key: str
    kind: str
    done: bool
    parents: tuple[str, ...]
    parameters: int | None = None
    tokens: int | None = None
    flops: int | None = None
    memory: int | None = None


def plan(lineage: Lineage, store: Store) -> list[PlannedNode]:
    """The nodes in the order in which they are grown, with what each will take.

    Trains no model. A tokenizer whose config states no size is trained, since parameters depend on it.
    """
    materials = Materials(store)
    there: set[Path] = set()
    rows = []
    for node in lineage.order:
        row, writing = _plan_node(node, lineage, store, materials), _writing(node, materials, there)
        rows.append(replace(row, flops=(row.flops or 0) + writing) if writing else row)
    return rows


def _writing(node: Node, materials: Materials, there: set[Path]) -> int:
    """What the texts of a lesson take that nobody has written yet; afterwards they are among those that are there."""
    flops, lineage = 0, materials.store.lineage
    for source in node.lesson.text:
        if isinstance(source, Text) or (place := materials.store.written(source)) in there or is_whole(place):
            continue
        there.add(place)
        nodes = [lineage[key] for key in (source.by, source.judged_by) if key]
        models = [one.model if isinstance(one.model, NGram) else sized(one, materials) for one in nodes]
        flops += writing_flops(drawn_tokens(source), models, longest(nodes[0], source.max_length))
    return flops


def _plan_node(node: Node, lineage: Lineage, store: Store, materials: Materials) -> PlannedNode:
    row = PlannedNode(node.key, kind(node), store.record(node) is not None, tuple(key for key, _ in node.parents))
    if isinstance(node.model, NGram):
        sizes = [source.size for source in node.lesson.text]
        tokens = None if None in sizes else sum(size or 0 for size in sizes)
        return replace(row, tokens=tokens, memory=tokens and tokens * COUNTING_BYTES_PER_TOKEN)
    if node.lesson.source:
        from epigone.models.decoder import parameter_count

        count = parameter_count(node.model)
        return replace(row, parameters=count, memory=count * (4 if node.model.weights_dtype == "float32" else 2))
    return _plan_decoder(row, node, lineage, materials)


def check_trained(node: Node) -> None:
    """Raises: UserError for a decoder without weights whose lesson does not say how it is trained."""
    if node.lesson.source is None and (node.lesson.training is None or node.lesson.objective is None):
        raise UserError(f"node '{node.key}' is trained: its lesson needs an objective and a training")


def _plan_decoder(row: PlannedNode, node: Node, lineage: Lineage, materials: Materials) -> PlannedNode:
    """Training takes 16 bytes a weight (gradient and moments too), 4 of an average and of a teacher, and logits.

    Weights beside adapters take their own size.
    """
    from epigone.lessons import inner
    from epigone.lessons.chunks import LOGITS_BYTES
    from epigone.models.decoder import flops_per_token, parameter_count
    from epigone.training.student import Student

    check_trained(node)
    training, config = node.lesson.training, sized(node, materials)
    length = training.sequence_length
    tokens = training.steps * training.batch_size * length
    student = Student(config, node.lesson.adapters)
    per_token, memory = student.flops_per_token(length), 16 * student.parameter_count()
    if student.adapters:
        memory += parameter_count(config) * (4 if config.weights_dtype == "float32" else 2)
    logits = min(max(LOGITS_BYTES.values()), 4 * training.batch_size * length * config.vocab_size)
    memory += logits
    memory += 4 * student.parameter_count() if training.ema_decay is not None else 0
    if node.lesson.mean_teacher:
        per_token, memory = per_token + flops_per_token(config, length, training=False), memory + logits
    own = node.lesson.on_policy
    per_token += own.written_share * flops_per_token(config, length, training=False) if own else 0
    for teacher in (lineage[key] for key in node.lesson.teachers):
        if isinstance(teacher.model, NGram):
            continue
        teaching = sized(teacher, materials)
        mixed = own.written_share if own and own.teacher_share else 0
        # One with another tokenizer is taken to read as many tokens as the student; its text says how many.
        per_token += (1 + mixed) * flops_per_token(teaching, length, training=False)
        memory += 4 * parameter_count(teaching) + logits
        if matches := node.lesson.objective.inner:
            per_token += inner.flops_per_token(matches, config.sizes, teaching.sizes, length)
            learned = inner.projections_of(matches, config.sizes, teaching.sizes)
            memory += 16 * sum(map(prod, learned.values()))
    flops = round(tokens * per_token)
    return replace(row, parameters=parameter_count(config), tokens=tokens, flops=flops, memory=memory)


def sized(node: Node, materials: Materials) -> Any:
    """A decoder's config with its vocabulary's size: its own, its tokenizer's config's, or its tokenizer's."""
    return replace(node.model, vocab_size=node.model.vocab_size or _vocab_size(node.tokenizer, materials))


def _vocab_size(config: TokenizerConfig, materials: Materials) -> int:
    if not isinstance(config, TrainedTokenizer):
        return config.vocab_size
    return getattr(config.algorithm, "vocab_size", None) or materials.tokenizer(config).size
