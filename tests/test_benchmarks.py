"""The parts of benchmarks that say who is faster: what is compared with what, and who is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("alternating", "train_step", "trainers", "trainers.work"):
        sys.modules.pop(name, None)


def test_every_round_has_every_job_and_begins_with_another(monkeypatch):
    import alternating

    monkeypatch.setattr(alternating, "PAUSE", 0.0)
    order = []
    jobs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    found = alternating.in_turn(jobs, 3)
    assert "".join(order) == "abcbcacab"
    assert found["a"].tolist() == [1.0, 6.0, 8.0]
    assert alternating.quartiles([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]) == (2.5, 3.0, 3.5)


def test_a_job_is_repeated_while_others_use_the_processor(monkeypatch):
    import alternating

    monkeypatch.setattr(alternating, "PAUSE", 0.0)
    own, busy, called = iter(range(100)), iter(range(0, 1000, 4)), []
    monkeypatch.setattr(alternating, "_seconds_of", lambda pid: next(own))
    monkeypatch.setattr(alternating, "_busy_seconds", lambda: next(busy))
    assert alternating.undisturbed(lambda: called.append(1) or 5.0, 0) == 5.0
    assert len(called) == alternating.TRIES
    monkeypatch.setattr(alternating, "_busy_seconds", lambda: next(own))
    alternating.undisturbed(lambda: called.append(1) or 5.0, 0)
    assert len(called) == alternating.TRIES + 1


def test_a_trainer_that_learns_something_else_is_refused():
    from types import SimpleNamespace

    import train_step

    wanted, forward_kl = (10.0, 9.0), 2.0
    same = SimpleNamespace(name=train_step.LEAN, losses=(10.0005, 9.0))
    divergence = SimpleNamespace(name=train_step.TRL, losses=(2.0001, 5.0))
    train_step.check([same, divergence], wanted, forward_kl)
    for losses in ((10.002, 9.0), (10.0, 9.002), (float("nan"), 9.0)):
        with pytest.raises(SystemExit, match="begins with losses"):
            train_step.check([SimpleNamespace(name=train_step.LEAN, losses=losses)], wanted, forward_kl)
    with pytest.raises(SystemExit, match=r"TRL.*begins with losses of \(10\.0,\), and Epigone with \(2\.0,\)"):
        train_step.check([SimpleNamespace(name=train_step.TRL, losses=wanted)], wanted, forward_kl)


def test_the_table_says_who_is_faster_by_how_much(capsys):
    import train_step

    ours, peer = np.array([1.0, 2.0, 1.0]), np.array([2.0, 4.0, 4.0])
    found = {
        train_step.OURS: train_step.Found(ours, ours, 10**9, 3.0),
        train_step.REAL: train_step.Found(1.02 * ours, ours, 10**9, 3.0),
        train_step.LEAN: train_step.Found(peer, ours, 2 * 10**9, 5.0),
    }
    train_step.report(found, fastest=4e9, flops=2 * 10**9, tokens=100)
    head, _, own, other, data = capsys.readouterr().out.splitlines()
    assert "fastest product 4 GFLOP/s" in head
    assert own.split() == ["Epigone", "100", "2.00", "1.00", "1.00-1.00", "1,000", "0.50", "3.0"]
    assert other.split()[3:] == ["50", "1.00", "2.00", "2.00-3.00", "2,000", "0.25", "5.0"]
    assert data.endswith("1.020 (1.020-1.020)")
