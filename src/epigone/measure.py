"""Measure a node that is grown: the model on held-out text, and the text that it writes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from epigone import evaluate, theory
from epigone.errors import UserError
from epigone.evaluate import quality
from epigone.evaluate.sameness import sameness
from epigone.lineage import Evaluation, Node
from epigone.materials import Materials, longest, seed_of
from epigone.models.language_model import MAX_LENGTH, Document
from epigone.view import View


@runtime_checkable
class Embeds(Protocol):
    """A model that makes vectors of documents."""

    def embed(self, documents: Sequence[Document]) -> np.ndarray: ...


HONEST = 500
"""Texts for which an honest user wants scores, and beginnings for which it wants texts."""

JUDGED = 100
"""Documents that the evaluation's judge reads of each node: it may be a large model."""

WRITTEN_MARGIN = 1.25
"""A node writes so much more than is measured, since the ends of documents are not part of the measured sample."""


def measured(node: Node, record: dict[str, Any], materials: Materials, view: View) -> dict[str, Any]:
    """The record with everything that the lineage's evaluation asks for."""
    evaluation = materials.store.lineage.evaluation
    if evaluation is None:
        return record | {"measured_as": materials.store.measured_as(node)}
    model, tokenizer = materials.model(node), materials.tokenizer(node.tokenizer)
    view.stage("measure")
    held_out = materials.documents(evaluation.text, node.tokenizer)
    at = {"longest": longest(node), "eos": tokenizer.specials.eos}
    contexts = evaluate.evaluation_contexts(held_out, evaluation.contexts, evaluation.seed, **at)
    sizes = materials.byte_counts(evaluation.text, node.tokenizer)
    learned = theory.learned(node, materials)
    record |= {"theory": learned.expected, "watched": learned.watched, "lost": learned.lost}
    record["metrics"] = evaluate.evaluate_model(model, held_out, sizes, contexts) | learned.measures
    record["agreement"] = {
        other.key: evaluate.compare_models(model, materials.model(other), contexts.prefixes, padded=True)
        for other in _compared(node, materials)
    }
    prompts = [tokenizer.encode(prompt) for prompt in evaluation.prompts]
    record["predictions"] = evaluate.predictions(model, prompts, tokenizer)
    if evaluation.write_tokens:
        view.stage("write")
        record["metrics"] |= _measure_writing(node, model, evaluation, materials, record)
    return record | {"measured_as": materials.store.measured_as(node)}


def compared(members: Sequence[Node], materials: Materials) -> dict[str, float]:
    """The sameness of a population, and the variety of what all of it writes, as the lineage's evaluation asks.

    Of the union of all texts each member writes an equal part, of `write_tokens` in all: so `union_distinct_n`,
    `union_vocabulary` and `union_vendi` compare with the same measures of one node.

    Raises: UserError for members of other tokenizers.
    """
    evaluation = materials.store.lineage.evaluation
    if evaluation is None:
        return {}
    first, tokenizer = members[0], materials.tokenizer(members[0].tokenizer)
    for other in members[1:]:
        if not _one_tokenizer(first, other, materials):
            raise UserError(f"a population of '{first.key}' and '{other.key}', which read other tokenizers: take one")
    models = [materials.model(node) for node in members]
    held_out = materials.documents(evaluation.text, first.tokenizer)
    at = {"longest": min(longest(node) for node in members), "eos": tokenizer.specials.eos}
    contexts = evaluate.evaluation_contexts(held_out, evaluation.contexts, evaluation.seed, **at)
    metrics = sameness(models, contexts, padded=True)
    if not evaluation.write_tokens:
        return metrics
    share = round(evaluation.write_tokens / len(members))
    enough = round(WRITTEN_MARGIN * share) + MAX_LENGTH
    seeds = [seed_of(materials.store.lineage.identities[node.key], "population") for node in members]
    written = [model.write(enough, seed) for model, seed in zip(models, seeds, strict=True)]
    return metrics | evaluate.union_metrics([evaluate.first_tokens(text, share) for text in written], tokenizer.size)


def watched(watch: Any, materials: Materials) -> dict[str, Any]:
    """Traffic at the box of a node that is grown: who is caught, and what that and each policy costs honest users."""
    from epigone.arena.watch import utility
    from epigone.arena.watch import watch as watch_traffic

    node = materials.store.lineage[watch.teacher]
    model, tokenizer = materials.model(node), materials.tokenizer(node.tokenizer)
    documents = materials.documents(watch.text, node.tokenizer)
    frames = [tokenizer.encode(frame) for frame in watch.frames]
    found = watch_traffic(watch, documents, frames, tokenizer.size)
    read = [document[: longest(node)] for document in documents[:HONEST]]
    prompts = [document[: min(6, len(document))] for document in read]
    found["boxes"] = {name: utility(model, box, read, prompts, watch.seed) for name, box in watch.boxes.items()}
    return found


def _measure_writing(
    node: Node, model: Any, evaluation: Evaluation, materials: Materials, record: dict[str, Any]
) -> dict[str, float]:
    """Measures of a text that the node writes, some of which the record keeps to be read."""
    tokenizer = materials.tokenizer(node.tokenizer)
    written = model.write(round(WRITTEN_MARGIN * evaluation.write_tokens), seed_of(record["identity"], "evaluate"))
    record["samples"] = [tokenizer.decode(ids) for ids in written[: evaluation.samples]]
    ancestor = materials.store.lineage.ancestor(node.key)
    judge = materials.model(ancestor) if _one_tokenizer(node, ancestor, materials) else None
    if judge is not None and judge.vocab_size < model.vocab_size:
        judge = None  # it cannot read all that the node may write
    judged = _judged([tokenizer.decode(ids) for ids in written[:JUDGED]], node, evaluation, materials)
    return judged | evaluate.evaluate_text(
        written,
        materials.index((evaluation.real,), node.tokenizer),
        evaluation.write_tokens,
        decode=tokenizer.decode,
        like=materials.documents(evaluation.text, node.tokenizer),
        judge=judge,
        cut_at=longest(node),
    )


def _judged(texts: list[str], node: Node, evaluation: Evaluation, materials: Materials) -> dict[str, float]:
    """What the evaluation's judge says of texts; nothing where it is not grown.

    `judge_bits_per_byte`: what they cost it, ends not counted. Of a decoder also `judge_vendi` and `judge_mauve`, of
    its embeddings of them, against as many held-out real texts.
    """
    judge = materials.store.lineage[evaluation.judge] if evaluation.judge else node
    texts = [text for text in texts if text]
    if judge.key == node.key or not texts or materials.store.record(judge) is None:
        return {}
    model, tokenizer = materials.model(judge), materials.tokenizer(judge.tokenizer)
    read = tokenizer.encode_batch(texts)
    found = quality.likelihood(model, read)
    within = replace(found, nats_M=found.nats_M - found.end_nats_M)
    metrics = {"judge_bits_per_byte": quality.bits_per_byte(within, [len(text.encode()) for text in texts])}
    if not isinstance(model, Embeds):
        return metrics
    decode = materials.tokenizer(node.tokenizer).decode
    like = [decode(ids) for ids in materials.documents(evaluation.text, node.tokenizer)[: len(texts)]]
    real_MD, written_MD = (model.embed(documents) for documents in (tokenizer.encode_batch(like), read))
    return metrics | evaluate.embedding_metrics(real_MD, written_MD, "judge")


def _compared(node: Node, materials: Materials) -> list[Node]:
    """Nodes whose next-token scores a node's are compared with: its teacher, and the one that the evaluation names."""
    others = [materials.store.lineage[key] for key in materials.store.compared(node)]
    return [o for o in others if _one_tokenizer(node, o, materials) and materials.store.record(o) is not None]


def _one_tokenizer(node: Node, other: Node, materials: Materials) -> bool:
    """Whether the same ids mean the same text to both; their models may differ in padding."""
    return materials.tokenizer(node.tokenizer).vocabulary == materials.tokenizer(other.tokenizer).vocabulary
