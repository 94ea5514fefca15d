"""Drift: eight ways to feed a generation, and the closed form of each, drawn over what happened.

What     A model that knows only how often each word stands in its text (an unsmoothed unigram) and its copies. What is
         left of the first text's variety follows from theory exactly, for any mixture of real and written text.
Why      Seddik et al. 2024 (arXiv 2404.05090), Gerstgrasser et al. 2024 (2404.01413), Kazdan et al. 2024 (2410.16713),
         Alemohammad et al. 2024 (2307.01850) ask which data regime stops collapse; Wright 1931 knew the first answer.
Command  epigone run configs/generations/drift.py
Cost     About a minute on two CPU cores.
Expect   `learned_heterozygosity` within its errors of the dotted line in every regime: replace falls like
         (1 - 1/N)^t, accumulate stays. `words_left` falls like the survival of a branching process where text is
         replaced.
"""

from functools import partial

from epigone import regimes
from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.families import chain
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.ngram import NGram
from epigone.models.smoothing import mle

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))

REGIMES = {
    "replace": regimes.replace,
    "grown": regimes.replace_grown,
    "accumulate": regimes.accumulate,
    "subsample": regimes.accumulate_subsample,
    "window": partial(regimes.sliding_window, last=3),
    "fixed": partial(regimes.fixed_share, share=0.25),
    "fresh": partial(regimes.fresh_share, share=0.25),
    "real": regimes.real_only,
}


def lineage(seeds: int = 16, generations: int = 10, tokens: int = 600) -> Lineage:
    """The same unigram under every regime.

    Args:
        seeds: repetitions, each from another part of the corpus.
        generations: after the first.
        tokens: of the text of each generation; the drift of one is 1 / tokens.
    """
    nodes: list[Node] = []
    for seed in range(seeds):
        own = Text(BIBLE, skip=(generations + 2) * tokens * seed, tokens=tokens)
        counting = Lesson(text=(own,))
        root = Node("word", 0, NGram(order=1, smoothing=mle), WORDS, counting, seed=seed, labels={"family": "words"})
        nodes.append(root)
        for name, regime in REGIMES.items():
            nodes += chain(root, generations, regime, name=name)
    evaluation = Evaluation(text=Text(BIBLE, split="test", tokens=5_000), real=Text(BIBLE), write_tokens=0, contexts=50)
    return Lineage("drift", tuple(nodes), evaluation, __doc__.partition("\n")[0])
