"""What a node learned, beside what theory expects of it: the words of its text, and how many are left of the first.

Theory speaks of models that write by the relative frequencies of what they read (`NGram(..., writing=mle)` at
temperature 1), and is exact where words are drawn independently (`order=1`). Other nodes have the measures alone.
"""

from typing import NamedTuple

import numpy as np

from epigone.evaluate import collapse_theory
from epigone.evaluate.collapse_theory import Block
from epigone.identity import fingerprint
from epigone.lineage import Node, Text, Written
from epigone.materials import Materials
from epigone.models.ngram import NGram
from epigone.models.smoothing import mle
from epigone.writing import is_chosen

MOST_TEXTS = 400
"""Texts of a node's history beyond which its theory is left out: it takes the square of their number."""


LEFT = ("words_left", "pairs_left", "triples_left")
"""Measures of the n-grams that are left, n = 1, 2, 3."""

WATCHED = 150
"""Words of generation 0's text whose fate is kept in the records."""

Measures = dict[str, float]
Source = Text | Written


class Learned(NamedTuple):
    """What is told of the text that a node learned.

    Attributes:
        measures: of the text.
        expected: what theory says of some of them.
        watched: words of a first text and their counts, so that their fate can be followed.
        lost: those of the watched words of the first text that this text lacks.
    """

    measures: Measures
    expected: Measures
    watched: list[tuple[str, int]]
    lost: list[str]


def learned(node: Node, materials: Materials) -> Learned:
    """Measures of the text that a node learned, and what theory expects of them where it says something.

    `learned_heterozygosity`: 1 - sum p^2 of the relative frequencies of its words, ends of documents among them; theory
    is `heterozygosity_of`, whatever the regime. `learned_words`: different words. `words_left`, `pairs_left`,
    `triples_left`: of the different words, pairs and triples of generation 0's text, those that are still there; theory
    (`survival`, of independent draws) has the words where each generation read nothing but as many of the one before.
    """
    first = materials.store.lineage.ancestor(node.key)
    if not node.lesson.text or first.tokenizer != node.tokenizer or not first.lesson.text:
        return Learned({}, {}, [], [])
    counts_V, first_V = _counts(node, materials), _counts(first, materials)
    words_V, first_words_V = counts_V.copy(), first_V.copy()
    words_V[materials.tokenizer(node.tokenizer).specials.eos] = 0
    first_words_V[materials.tokenizer(node.tokenizer).specials.eos] = 0
    measures = {
        "learned_heterozygosity": float(collapse_theory.heterozygosity(counts_V / counts_V.sum())),
        "learned_words": float(np.count_nonzero(words_V)),
    }
    # A node of a later generation that reads real text alone, as a control does, has no first generation to lose from.
    if first is node and node.generation:
        return Learned(measures, {}, [], [])
    expected = {}
    if (history := _history(node, materials)) is not None:
        expected["learned_heterozygosity"] = float(collapse_theory.heterozygosity_of(*history)[-1])
    if (copies := _copies(node, materials)) is not None:
        expected["words_left"] = float(collapse_theory.survival(first_words_V[first_words_V > 0], copies).sum())
    token, watched = materials.tokenizer(node.tokenizer).token, _watched(first_words_V)
    lost = [token(word) for word in watched if not words_V[word]]
    shown = [(token(word), int(first_words_V[word])) for word in watched] if first is node else []
    return Learned(measures | _left(node, first, materials), expected, shown, lost)


def _watched(counts_V: np.ndarray) -> list[int]:
    """Some words of the first text, from the most frequent to the rarest in even steps of their rank."""
    ranked = np.argsort(-counts_V, kind="stable")[: np.count_nonzero(counts_V)]
    steps = np.unique(np.linspace(0, len(ranked) - 1, min(WATCHED, len(ranked))).round().astype(int))
    return [int(word) for word in ranked[steps]]


def _left(node: Node, first: Node, materials: Materials) -> Measures:
    """How many of the first text's n-grams are in the text that a node learned."""
    index, start = materials.index(first.lesson.text, node.tokenizer), fingerprint(first.lesson.text)

    def present(source: Source, n: int) -> np.ndarray:
        name = ("present", start, fingerprint([source, node.tokenizer]), str(n))
        return materials.once(name, lambda: np.unique(index.ranks(materials.documents(source, node.tokenizer), n)))

    found = {name: [present(source, n) for source in node.lesson.text] for n, name in enumerate(LEFT, start=1)}
    return {name: float(np.count_nonzero(np.unique(np.concatenate(ranks)) >= 0)) for name, ranks in found.items()}


def _counts(node: Node, materials: Materials) -> np.ndarray:
    """How often each token stands in what a node learned, ends of documents among them [V]."""
    return np.sum([_count(source, node, materials) for source in node.lesson.text], axis=0)


def _count(source: Source, node: Node, materials: Materials) -> np.ndarray:
    return materials.once(("counts", fingerprint([source, node.tokenizer])), lambda: _counted(source, node, materials))


def _counted(source: Source, node: Node, materials: Materials) -> np.ndarray:
    tokenizer, documents = materials.tokenizer(node.tokenizer), materials.documents(source, node.tokenizer)
    tokens = np.concatenate([np.zeros(0, np.int32), *documents])
    counts_V = np.bincount(tokens, minlength=tokenizer.size).astype(np.float64)
    counts_V[tokenizer.specials.eos] += len(documents)
    return counts_V


def _repeats_what_it_saw(node: Node, orders: tuple[int, ...] | None = None) -> bool:
    """Whether a node keeps relative frequencies, and all it reads of others was sampled as it is."""
    counts = isinstance(node.model, NGram) and (node.model.writing or node.model.smoothing) is mle
    written = [source for source in node.lesson.text if isinstance(source, Written)]
    plain = all(
        source.temperature == 1 and not source.top_k and source.top_p == 1 and not is_chosen(source)
        for source in written
    )
    return counts and plain and (orders is None or node.model.order in orders)


def _copies(node: Node, materials: Materials) -> int | None:
    """How often the real text was replaced by a text of its size; None where anything else happened on the way."""
    lineage, copies, size = materials.store.lineage, 0, None
    while _repeats_what_it_saw(node) and len(node.lesson.text) == 1:
        source = node.lesson.text[0]
        size = size or source.size
        if source.size != size or source.subsample is not None:
            return None
        if isinstance(source, Text):
            return copies
        node, copies = lineage[source.by], copies + 1
    return None


def _history(node: Node, materials: Materials) -> tuple[list[Block], list[list[int]], np.ndarray] | None:
    """What `heterozygosity_of` takes: all texts behind a node, and who read which; None where theory does not hold."""
    lineage = materials.store.lineage
    wanted, waiting = {node.key}, [node]
    while waiting:
        one = waiting.pop()
        if not _repeats_what_it_saw(one, orders=(1,)) or one.tokenizer != node.tokenizer:
            return None
        writers = {source.by for source in one.lesson.text if isinstance(source, Written)} - wanted
        wanted |= writers
        waiting += [lineage[key] for key in writers]
    nodes = [one for one in lineage.order if one.key in wanted]
    sources = list(dict.fromkeys(source for one in nodes for source in one.lesson.text))
    wholes: list[Source] = list(dict.fromkeys(source.whole for source in sources))
    numbers = {one.key: number for number, one in enumerate(nodes)}
    texts = _in_order(list(dict.fromkeys([*wholes, *sources])), numbers)
    if len(texts) > MOST_TEXTS:
        return None
    counts = [_count(text, node, materials) for text in texts]
    sizes = [int(counts_V.sum()) for counts_V in counts]
    real_V = counts[: sum(isinstance(text, Text) for text in wholes)]
    blocks = [_block(text, size, texts, numbers) for text, size in zip(texts, sizes, strict=True)]
    shares_RV = np.array([counts_V / counts_V.sum() for counts_V in real_V])
    return blocks, [[texts.index(source) for source in one.lesson.text] for one in nodes], shares_RV @ shares_RV.T


def _in_order(texts: list[Source], numbers: dict[str, int]) -> list[Source]:
    """Whole real texts first, then each text behind what its writer read, and a part behind its whole."""

    def place(text: Source) -> tuple[int, bool]:
        return (numbers[text.by] + 1 if isinstance(text, Written) else 0, text.subsample is not None)

    return sorted(texts, key=place)


def _block(text: Source, size: int, texts: list[Source], numbers: dict[str, int]) -> Block:
    if text.subsample is not None:
        return Block(size, part_of=texts.index(text.whole))
    return Block(size, writer=numbers[text.by] if isinstance(text, Written) else None)
