"""Transformers and their copies: the data regimes of the literature at half a million weights, and cold sampling.

What     A transformer of two layers on 60,000 words, and four generations that begin afresh and read what the ones
         before wrote, under eight regimes; and copies of text that was sampled cold or from a nucleus. Models that read
         more text train longer, so that each reads its text about as often.
Why      Gerstgrasser et al. 2024 (arXiv 2404.01413), table 2: at round 4 a 9M GPT-2 has a cross-entropy of 1.74 where
         text accumulates (1.82 at first), 2.18 where it is replaced by as much, 2.39 where it is replaced; at
         temperature 0.3 it is 5.82. Kazdan et al. 2024 (2410.16713): a subsample of constant size lies between.
         Shumailov et al. 2024 (Nature 631:755): a tenth of real data leaves only a little of the harm.
Command  epigone run configs/generations/transformers.py
Cost     About 25 minutes on two CPU cores.
Expect   Perplexity at generation 4: accumulate < subsample < replace; temperature 0.3 far worse than all. The order of
         the papers, not their sizes: the models are twenty times smaller and read a hundred thousand words.
"""

from dataclasses import replace as change
from functools import partial
from typing import Any

from epigone import regimes
from epigone.data.corpora import Embedded
from epigone.data.tokenizers import Words
from epigone.families import chain
from epigone.lessons.objective import TEXT_ALONE
from epigone.lineage import Claim, Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

BIBLE = Embedded("bbe", unit="verse")
WORDS = TrainedTokenizer(Words(lowercase=True), Text(BIBLE))
MODEL = DecoderConfig(layers=2, model_size=80, heads=4, max_length=128)

GROWING = {"accumulate": regimes.accumulate, "grown": regimes.replace_grown}
CONSTANT = {
    "replace": regimes.replace,
    "subsample": regimes.accumulate_subsample,
    "window": partial(regimes.sliding_window, last=2),
    "fixed": partial(regimes.fixed_share, share=0.1),
    "fresh": partial(regimes.fresh_share, share=0.1),
    "real": regimes.real_only,
}
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.7": {"temperature": 0.7},
    "nucleus 0.9": {"top_p": 0.9},
}


def lineage(seeds: int = 2, generations: int = 4, tokens: int = 60_000, steps: int = 180) -> Lineage:
    """Transformers under every regime and kind of sampling.

    Args:
        seeds: repetitions, each from another part of the corpus.
        generations: after the first.
        tokens: of the text of each generation.
        steps: of training on that many tokens.
    """
    nodes: list[Node] = []
    for seed in range(seeds):
        own = Text(BIBLE, skip=50_000 * seed, tokens=tokens)
        first = _reads(own, steps, seed)
        longer = [_reads(own, steps * (g + 1), seed) for g in range(1, generations + 1)]
        window = [_reads(own, steps * min(g + 1, 2), seed) for g in range(1, generations + 1)]
        nodes.append(first)
        for name, regime in (GROWING | CONSTANT).items():
            successors = longer if name in GROWING else window if name == "window" else [first]
            nodes += chain(first, generations, regime, name=name, successors=successors)
        for number, (label, how) in enumerate(SAMPLED.items()):
            writing = Written(by="", tokens=0, **how)
            copies = chain(first, generations, regimes.replace, name=f"sampled-{number}", writing=writing)
            nodes += [change(node, labels={"family": "sampling", "regime": label}) for node in copies]
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=20_000), real=Text(BIBLE), write_tokens=8_000, contexts=200
    )
    last = {name: f"{name}@{generations}" for name in ("accumulate", "subsample", "replace", "fixed", "sampled-0")}
    table = "Gerstgrasser et al. 2024, table 2"
    claims = (
        Claim("accumulated text loses less than replaced text", table, (last["accumulate"], last["replace"])),
        Claim(
            "where text accumulates, the last model is better than the first", table, (last["accumulate"], "reader@0")
        ),
        Claim(
            "a sample of constant size of all text so far lies between accumulated and replaced text",
            "Kazdan et al. 2024",
            (last["accumulate"], last["subsample"], last["replace"]),
        ),
        Claim("sampling at temperature 0.3 is far worse", table, (last["replace"], last["sampled-0"])),
        Claim("a tenth of real text takes away harm", "Shumailov et al. 2024", (last["fixed"], last["replace"])),
    )
    return Lineage("transformers", tuple(nodes), evaluation, __doc__.partition("\n")[0], claims=claims)


def _reads(text: Text, steps: int, seed: int) -> Node:
    optimizer = Optimizer(learning_rate=3e-3, warmup_steps=20)
    training = Training(steps=steps, batch_size=4, sequence_length=128, optimizer=optimizer)
    lesson = Lesson(text=(text,), objective=TEXT_ALONE, training=training)
    return Node("reader", 0, MODEL, WORDS, lesson, seed=seed, labels={"family": "regimes"})
