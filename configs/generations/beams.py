"""Collapse by beam search: generations that complete real prompts with what they hold most probable.

What     A transformer reads real text; each of three generations after it reads completions, by five beams, of the
         beginnings of real documents, as its parent writes them. Once with nothing else, once with a tenth of real text
         at the same size, once sampled in the place of the search.
Why      Shumailov et al. 2024 (Nature 631:755): OPT-125m, blocks of 64 tokens completed by 64 more with five beams;
         from 20 to 28 points of perplexity after five epochs without real data, "only minor degradation" with a tenth.
Command  epigone run configs/generations/beams.py
Cost     About ten minutes on two CPU cores.
Expect   Search is far worse than sampling: its text repeats itself. A tenth of real text takes away most of the harm.
"""

from dataclasses import replace as change
from functools import partial

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
MODEL = DecoderConfig(layers=2, model_size=80, heads=4, max_length=64)


def lineage(
    seeds: int = 2, generations: int = 3, tokens: int = 40_000, steps: int = 150, beams: int = 5, given: int = 8
) -> Lineage:
    """Completions that are searched for, with and without real text, and sampled ones.

    Args:
        seeds: repetitions, each from another part of the corpus.
        generations: after the first.
        tokens: of the text of each generation.
        steps: of training on it.
        beams: of the search.
        given: tokens of each real document that are completed.
    """
    nodes: list[Node] = []
    for seed in range(seeds):
        own = Text(BIBLE, skip=60_000 * seed, tokens=tokens)
        training = Training(
            steps=steps, batch_size=8, sequence_length=64, optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20)
        )
        lesson = Lesson(text=(own,), objective=TEXT_ALONE, training=training)
        first = Node("reader", 0, MODEL, WORDS, lesson, seed=seed, labels={"family": "completions"})
        nodes.append(first)
        prompts = Text(BIBLE, skip=300_000, tokens=8 * tokens)
        searched = Written(by="", tokens=0, max_length=64, beams=beams, prompts=prompts, prompt_tokens=given)
        share = partial(regimes.fixed_share, share=0.1)
        ways = {
            f"{beams} beams": (regimes.replace, searched),
            f"{beams} beams, a tenth real": (share, searched),
            "sampled": (regimes.replace, change(searched, beams=0)),
            "sampled, a tenth real": (share, change(searched, beams=0)),
        }
        for number, (label, (regime, writing)) in enumerate(ways.items()):
            copies = chain(first, generations, regime, name=f"completed-{number}", writing=writing)
            nodes += [change(node, labels={"family": "completions", "regime": label}) for node in copies]
    evaluation = Evaluation(
        text=Text(BIBLE, split="test", tokens=20_000), real=Text(BIBLE), write_tokens=8_000, contexts=200
    )
    last = [f"completed-{number}@{generations}" for number in range(4)]
    nature = "Shumailov et al. 2024, figure 1"
    claims = (
        Claim("completions by beam search make each generation worse", nature, ("reader@0", last[0])),
        Claim("a tenth of real text takes away most of the harm", nature, (last[1], last[0])),
    )
    return Lineage("beams", tuple(nodes), evaluation, __doc__.partition("\n")[0], claims=claims)
