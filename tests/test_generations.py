"""What must hold of generations, on the shipped config of trigrams: order of the regimes, a bound, a flat control."""

from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import linregress, t
from tiny import Silent

from epigone.grow import grow
from epigone.report.records import load_run
from epigone.report.summaries import generation_series
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "generations" / "trigrams.py"
NAMES = {"trigram", "replace", "accumulate", "subsample", "fresh", "real", "noisy", "noisy-accumulate"}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """(family, regime) -> perplexity at each generation, of one seed."""
    whole = load_config(CONFIG)(seeds=1)
    few = replace(whole.evaluation.text, tokens=10_000)
    evaluation = replace(whole.evaluation, text=few, write_tokens=0, contexts=20)
    lineage = replace(whole, nodes=tuple(n for n in whole.nodes if n.name in NAMES), evaluation=evaluation)
    run = tmp_path_factory.mktemp("generations") / "run"
    grow(lineage, run, view=Silent())
    series = generation_series(load_run(run))
    return {(s.family, s.regime): {g: p.mean for g, p in s.points("perplexity").items()} for s in series}


def test_the_tuned_order_of_the_regimes_is_that_of_the_literature(curves):
    last = [curves["regimes", name][10] for name in ("real only", "accumulate", "accumulate subsample", "fresh share",
                                                     "replace")]  # fmt: skip
    assert last == sorted(last)
    assert last[1] * 1.1 < last[2]
    assert last[3] * 1.2 < last[4]


def test_accumulated_text_is_bounded_where_writers_add_nothing(curves):
    kept = curves["regimes", "accumulate"]
    assert max(kept.values()) < 1.15 * kept[0]
    # The control of the claim: writers that add a little noise leave the bound.
    noisy = curves["writing what smoothing made up", "accumulate"]
    assert noisy[0] == kept[0]
    assert noisy[10] > 1.25 * noisy[0]


def test_the_control_stays_flat_and_copies_do_not(curves):
    def interval(regime):
        points = curves["regimes", regime]
        line = linregress(list(points), list(points.values()))
        half = t.ppf(0.975, len(points) - 2) * line.stderr
        return line.slope - half, line.slope + half

    low, high = interval("real only")
    assert low < 0 < high
    assert interval("replace")[0] > 3
    assert interval("fresh share")[0] > 0
