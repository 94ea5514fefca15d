"""Which meshes are tried, and which comes first."""

from dataclasses import replace
from math import prod

import pytest
from small_steps import STUDENT, step

from epigone.errors import UserError
from epigone.planning.search import ZERO, candidates, rank, search
from epigone.planning.topologies import topology
from epigone.training.config import Hardware


def test_all_devices_are_used_and_every_batch_divides():
    where = topology("h100:8")
    ways = list(candidates(step(batch=32), where, Hardware(checkpoint_every_steps=5)))
    assert len({(way.fsdp, way.tensor) for way in ways}) == 4
    assert len(ways) == len(set(ways))
    for way in ways:
        assert prod((way.data, way.fsdp, way.tensor)) == 8
        assert 32 % (way.microbatches * way.fsdp) == 0
        assert way.checkpoint_every_steps == 5


def test_experts_are_cut_where_there_are_some():
    where, few = topology("h100:8"), replace(STUDENT, experts=12)
    ways = list(candidates(step(few, batch=32), where, Hardware()))
    assert {way.expert for way in ways} == {1, 2, 4}, "12 experts on 8 devices"
    assert all(prod(way.sizes) == 8 for way in ways)
    assert {way.expert for way in candidates(step(batch=32), where, Hardware())} == {1}


def test_those_that_fit_first_and_of_these_the_fastest():
    shares = []
    plans = search(step(batch=8), topology("h100:8"), Hardware(), None, shares.append)
    assert sum(shares) == pytest.approx(1)
    assert [rank(plan) for plan in plans] == sorted(rank(plan) for plan in plans)
    assert all(plan.fits for plan in plans)
    # Heads that do not divide by 8 leave no such mesh, but for models that are not cut over it.
    assert all(plan.hardware.teacher == ZERO for plan in plans if plan.hardware.tensor == 8)
    assert any(plan.hardware.tensor == 8 for plan in plans)


def test_larger_than_the_memory_is_ranked_last():
    large = replace(STUDENT, model_size=8192, layers=64)
    plans = search(step(large, None, batch=4), topology("h100:2"), Hardware(), None, lambda share: None)
    assert not any(plan.fits for plan in plans)
    assert [plan.used for plan in plans] == sorted(plan.used for plan in plans)


def test_nothing_divides():
    with pytest.raises(UserError, match="nothing divides over 8 devices of h100:8"):
        search(step(batch=3), topology("h100:8"), Hardware(), None, lambda share: None)
