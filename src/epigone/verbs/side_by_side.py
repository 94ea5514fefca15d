"""A node on a text, alone or side by side with its teacher."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from epigone.evaluate import quality, text_metrics, top_metrics
from epigone.evaluate.agreement import Comparison
from epigone.evaluate.calibration import TopPredictions, first_choices
from epigone.evaluate.contexts import evaluation_contexts, score_contexts
from epigone.evaluate.quality import Likelihood
from epigone.models.language_model import MAX_LENGTH, Document, LanguageModel
from epigone.opened import OpenedNode
from epigone.verbs.held_out import Encoded, HeldOut, encoded
from epigone.verbs.progress import progress

CHUNK = 2**15
"""Tokens that are scored between two looks at the progress."""

ROLES = ("node", "teacher")


def measure(nodes: Sequence[OpenedNode], held_out: HeldOut, contexts: int, seed: int) -> dict[str, Any]:
    """The figures of a node, and, where a second one is its teacher, of that one and of the two together.

    Args:
        nodes: the node, and its teacher if there is one.
        held_out: the text.
        contexts: places at which calibration and agreement are measured.
        seed: chooses them.

    Returns:
        `node` and `teacher` with the figures of `evaluate_model`, `nats_per_end`, `seconds` and `tokens_per_second`; of
        two nodes that share a tokenizer `agreement` (`compare_models`); `difference`, node less teacher, with standard
        errors over documents; `notes`: a line for each figure that has no meaning here, and why.
    """
    texts = {opened.tokenizer.identity: encoded(held_out.texts, opened.tokenizer) for opened in nodes}
    own = [texts[opened.tokenizer.identity] for opened in nodes]
    found: dict[str, Any] = {"notes": list(_lossy(nodes, own))}
    same = len(nodes) == 2 and _comparable(*nodes)
    scores = []
    for role, opened, text in zip(ROLES, nodes, own, strict=False):
        likelihood, seconds = _scored(opened, text.documents)
        scores.append(likelihood)
        figures = text_metrics(likelihood, None if text.lost else text.byte_counts)
        figures["nats_per_end"] = quality.nats_per_end(likelihood)
        speed = {"seconds": seconds, "tokens_per_second": figures["tokens_evaluated"] / seconds}
        found[role] = named(opened) | figures | speed
    for group in [(0, 1)] if same else [(i,) for i in range(len(nodes))]:
        members = [nodes[i] for i in group]
        tops, agreement = _at_contexts(members, own[group[0]].documents, contexts, seed)
        for i, top in zip(group, tops, strict=True):
            found[ROLES[i]] |= top_metrics(top)
        if agreement is not None:
            found["agreement"] = agreement.means()
    if len(nodes) == 2:
        found["difference"] = _differences(scores, own, same)
        if not same:
            found["notes"].append(_refusal(*nodes))
    return found


def _scored(opened: OpenedNode, documents: Sequence[Document]) -> tuple[Likelihood, float]:
    """Scores of the documents, in their order, and the seconds that took, compilation included."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))  # neighbours need little padding
    sizes = np.array([len(documents[i]) + 1 for i in order])
    chunks = np.split(np.array(order), np.flatnonzero(np.diff((np.cumsum(sizes) - 1) // CHUNK)) + 1)
    model, parts, began = opened.model, [], time.perf_counter()
    with progress(f"{opened.node.key}: text", int(sizes.sum())) as advance:
        for chunk in chunks:
            parts.append(quality.likelihood(model, [documents[i] for i in chunk]))
            advance(int(parts[-1].events_M.sum()))
    return functools.reduce(Likelihood.__add__, parts)[np.argsort(order)], time.perf_counter() - began


def _at_contexts(
    nodes: Sequence[OpenedNode], documents: Sequence[Document], count: int, seed: int
) -> tuple[list[TopPredictions], Comparison | None]:
    """First choices of one node or two at places of the text, and the comparison of two; all in one pass."""
    models = [opened.model for opened in nodes]
    eos = nodes[0].tokenizer.specials.eos
    longest = min(longest_context(model) for model in models)
    contexts = evaluation_contexts(documents, count, seed, longest=longest, eos=eos)
    comparison = Comparison() if len(nodes) == 2 else None
    chunks: list[list[tuple[np.ndarray, np.ndarray]]] = []
    with progress(f"{' and '.join(opened.node.key for opened in nodes)}: places", len(contexts)) as advance:
        for scores in score_contexts(models, contexts.prefixes, padded=True):
            chunks.append([first_choices(scores_MV) for scores_MV in scores])
            if comparison is not None:
                comparison.add(*scores)
            advance(len(scores[0]))
    tops = []
    for of_model in zip(*chunks, strict=True):
        confidence_M, chosen_M = (np.concatenate(parts) for parts in zip(*of_model, strict=True))
        tops.append(TopPredictions(confidence_M, chosen_M == contexts.targets_M))
    return tops, comparison


def longest_context(model: LanguageModel) -> int:
    """Tokens of the longest prefix that a model is asked about, as when a run measures it."""
    config = getattr(model, "config", None)
    return MAX_LENGTH if config is None else min(MAX_LENGTH, config.max_length - 1)


def _comparable(node: OpenedNode, teacher: OpenedNode) -> bool:
    """Whether two nodes give scores to the same tokens."""
    return node.tokenizer.vocabulary == teacher.tokenizer.vocabulary


def _refusal(node: OpenedNode, teacher: OpenedNode) -> str:
    sizes = (f"{n.node.key} has {n.model.vocab_size} tokens ('{n.tokenizer.name}')" for n in (node, teacher))
    return f"no agreement, KL or difference a token: {' and '.join(sizes)}; bits a byte compare"


def _lossy(nodes: Sequence[OpenedNode], texts: Sequence[Encoded]) -> Iterator[str]:
    """Why bits a byte are absent, for each tokenizer that loses text."""
    losing = {n.tokenizer.identity: (n.tokenizer.name, text) for n, text in zip(nodes, texts, strict=True) if text.lost}
    for identity, (name, text) in losing.items():
        keys = " and ".join(n.node.key for n in nodes if n.tokenizer.identity == identity)
        lost = f"the tokenizer '{name}' does not give back {text.lost} of {len(text.documents)} documents"
        yield f"no bits a byte for {keys}: {lost}"


def _differences(scores: Sequence[Likelihood], texts: Sequence[Encoded], same: bool) -> dict[str, float]:
    """Node less teacher, with standard errors over documents: a token where they share a tokenizer, and a byte."""
    found: dict[str, float] = {}
    if same:
        gap, error = quality.paired_difference(scores[0], scores[1], scores[0].events_M)
        found |= {"nats_per_token": gap, "nats_per_token_error": error}
    if not any(text.lost for text in texts):
        sizes_M = np.array(texts[0].byte_counts)
        gap, error = (value / np.log(2) for value in quality.paired_difference(scores[0], scores[1], sizes_M))
        found |= {"bits_per_byte": float(gap), "bits_per_byte_error": float(error)}
    return {name: value for name, value in found.items() if not np.isnan(value)}


def named(opened: OpenedNode) -> dict[str, Any]:
    """Which node it is."""
    key, identity = opened.node.key, opened.record.get("identity")
    return {"key": key, "identity": identity, "run": str(opened.run), "tokenizer": opened.tokenizer.name}
