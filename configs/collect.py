"""Ask a served teacher for the rest of ten thousand verses, and keep what it answers.

What     The first six words of verses go to an endpoint, which goes on from each for up to 32 tokens, with the five
         best scores of each place. The answers become a data set: a lineage reads `Collected("collections/bbe")`.
Why      A student that sees only text, or text and a few scores, learns what a prompt box lets out (Tramèr et al. 2016;
         Kim and Rush 2016).
Command  epigone run configs/quickstart.py --node teacher@0
         epigone serve teacher@0 --run runs/quickstart --open
         epigone collect configs/collect.py            (in another terminal; add --dry-run for what it may cost)
Cost     Minutes on two CPU cores, most of them the teacher's; no money.
Expect   10,000 answers in collections/bbe/answers. Killed and started again, it goes on, and asks nothing twice.
"""

from epigone.arena.collector import Budget, Collection
from epigone.arena.endpoint import Asking, Endpoint
from epigone.arena.prompts import First, Prefixes
from epigone.data.corpora import Embedded


def collection() -> Collection:
    """Ten thousand verses that a teacher goes on from."""
    return Collection(
        "bbe",
        Endpoint("http://127.0.0.1:8000/v1", "quickstart/teacher@0", together=8, at_once=8),
        First(Prefixes(Embedded("bbe", unit="verse"), words=6), 10_000),
        Asking(max_tokens=32, seed=0, scores=5),
        Budget(tokens=2_000_000),
    )
