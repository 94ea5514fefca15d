"""Small models trained together in one program beside the same models one after the other, in one run.

Each reads its own 20,000 words of the embedded corpus, from a seed of its own. Compilation is left out, for both: the
programs have run before. Of the runs alone as many are timed as `--alone` says, spread over the seeds; the losses at
the end must be those of the members.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from epigone.runtime import prepare

prepare()

# ruff: noqa: E402
import numpy as np
from alternating import PAUSE

from epigone.data.corpora import Embedded
from epigone.data.packing import pack
from epigone.data.pipeline import Batches
from epigone.data.tokenizers import Words
from epigone.lessons.objective import TEXT_ALONE
from epigone.models.config import DecoderConfig
from epigone.models.decoder import parameter_count
from epigone.training.config import Training
from epigone.training.loop import train
from epigone.training.optimizer import Optimizer
from epigone.training.together import Member, train_together

TOKENS = 20_000


def members(count: int, training: Training) -> tuple[int, list[Member]]:
    """The size of the vocabulary, and so many models with parts of the corpus, which overlap where it is too short."""
    with tempfile.TemporaryDirectory() as folder:
        texts = list(Embedded("bbe", unit="verse").prepare(Path(folder))["train"])
    tokenizer = Words(max_size=500).build(texts)
    documents = tokenizer.encode_batch(texts)
    starts = np.random.default_rng(0).integers(0, len(documents) * 3 // 4, count)
    ends = np.cumsum([len(document) + 1 for document in documents])
    found = []
    for number, start in enumerate(map(int, starts)):
        end = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + TOKENS))
        rows = pack(documents[start:end], training.sequence_length, tokenizer.specials)
        found.append(Member(f"reference.s{number}", number, Batches([rows], None, training.batch_size, number)))
    return tokenizer.size, found


def last_losses(curves: Sequence[list[dict[str, float]]]) -> np.ndarray:
    """The loss at the last point of each curve."""
    return np.array([curve[-1]["loss"] for curve in curves])


def main() -> None:
    """Train, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="models that are trained together; default 200")
    parser.add_argument("--alone", type=int, default=5, help="of them alone in each round; default 5")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--steps", type=int, default=100, help="default 100")
    parser.add_argument("--layers", type=int, default=1, help="default 1")
    parser.add_argument("--width", type=int, default=16, help="default 16")
    parser.add_argument("--batch-size", type=int, default=4, help="default 4")
    parser.add_argument("--length", type=int, default=32, help="default 32")
    given = parser.parse_args()
    training = Training(
        steps=given.steps,
        batch_size=given.batch_size,
        sequence_length=given.length,
        optimizer=Optimizer(),
        compare_every=None,
    )
    vocab_size, every = members(given.count, training)
    heads = max(1, given.width // 8)
    model = DecoderConfig(
        layers=given.layers, model_size=given.width, heads=heads, max_length=given.length, vocab_size=vocab_size
    )

    def alone(member: Member, steps: int = given.steps) -> list[dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            place, more = Path(folder), {"seed": member.seed, "identity": "0" * 16}
            return train(model, training, TEXT_ALONE, member.batches, directory=place, **more).curve

    work = f"{given.steps} steps of {given.batch_size} rows of {given.length} tokens"
    print(f"{given.count} models of {parameter_count(model):,} weights, {work}", flush=True)
    alone(every[0])
    found = train_together(model, training, TEXT_ALONE, every)
    ratios = []
    for number in range(given.rounds):
        time.sleep(PAUSE)
        began = time.perf_counter()
        found = train_together(model, training, TEXT_ALONE, every)
        together = time.perf_counter() - began
        chosen = list(range(number, given.count, max(1, given.count // given.alone)))[: given.alone]
        began = time.perf_counter()
        curves = [alone(every[index]) for index in chosen]
        one = (time.perf_counter() - began) / len(chosen)
        gap = np.abs(last_losses(curves) - last_losses([found[index].curve for index in chosen])).max()
        if not gap < 1e-3:
            raise SystemExit(f"a model that is trained together ends {gap:.2g} away from the same model alone")
        ratios.append(together / one)
        print(
            f"together {together:.1f} s, one alone {one:.2f} s: {given.count} cost as much as {ratios[-1]:.1f} alone",
            flush=True,
        )
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(f"{given.count} models cost as much as {middle:.1f} ({low:.1f}-{high:.1f}) single ones")


if __name__ == "__main__":
    main()
