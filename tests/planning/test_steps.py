"""Steps of nodes for devices that are not here: counted anywhere, compiled for TPUs through libtpu."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from small_steps import OVER_ALL, STUDENT, TEACHER, step

from epigone.errors import UserError
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.adapters import LowRank
from epigone.planning import steps
from epigone.planning.estimate import Plan
from epigone.planning.steps import compiled, counted
from epigone.planning.topologies import topology
from epigone.training.config import Hardware

SHARDED = Hardware(2, 2, 2, teacher=OVER_ALL, microbatches=2)


@pytest.mark.parametrize("name", ["h100:8", "v5p:2x2x2"])
def test_arguments_are_what_the_rules_say(name):
    found = counted(step(), topology(name), SHARDED)
    weights = decoder.parameter_count(STUDENT) * 4
    assert found.arguments["weights"] == pytest.approx(weights / 4, rel=0.05)  # norms are not cut over tensor
    assert found.arguments["optimizer"] == pytest.approx(2 * found.arguments["weights"], rel=1e-3)
    assert found.arguments["teacher"] == pytest.approx(decoder.parameter_count(TEACHER) * 4 / 8, rel=0.05)
    assert found.without.flops < found.costs.flops
    assert found.without.flops + found.teaching.flops == pytest.approx(found.costs.flops, rel=0.2)


def test_adapters_and_averages_have_kinds_of_their_own():
    what = step()
    lesson = replace(what.node.lesson, adapters=LowRank(rank=2), start_from="base@0")
    adapted = replace(what, node=replace(what.node, lesson=lesson))
    found = counted(adapted, topology("h100:8"), SHARDED)
    plain = counted(what, topology("h100:8"), SHARDED)
    assert found.arguments["frozen"] == pytest.approx(plain.arguments["weights"])
    assert found.arguments["weights"] < 0.2 * plain.arguments["weights"]
    averaged = replace(what.node.lesson, training=replace(what.node.lesson.training, ema_decay=0.9), teacher=None)
    mean = replace(averaged, mean_teacher=True, objective=Objective())
    found = counted(replace(what, node=replace(what.node, lesson=mean), teachers=()), topology("h100:8"), SHARDED)
    assert found.arguments["average"] == found.arguments["weights"] == plain.arguments["weights"]


def test_a_windowed_layer_on_a_tpu_takes_the_larger_of_its_two_kernels():
    plain = counted(step(), topology("v5p:2x2x2"), SHARDED)
    mixed = replace(STUDENT, window=64, window_pattern=(True, False))
    assert counted(step(mixed), topology("v5p:2x2x2"), SHARDED).costs.flops == plain.costs.flops


def test_compiled_for_chips_that_are_not_here():
    pytest.importorskip("libtpu")
    student, teacher = (replace(one, dtype="bfloat16", weights_dtype="bfloat16") for one in (STUDENT, TEACHER))
    what, where = step(student, teacher, batch=32, length=256), topology("v5e:4x4")
    hardware = Hardware(fsdp=8, tensor=2, teacher=OVER_ALL)
    found = counted(what, where, hardware)
    said = compiled(what, where, hardware)
    assert said.seconds > 0
    plan = Plan(what, where, hardware, found, said)
    assert plan.fits
    # Small arrays lie padded to tiles, so that the compiler needs more than their bytes.
    assert sum(found.arguments.values()) <= said.arguments < 6 * sum(found.arguments.values())
    gathered = [row for row in plan.as_json()["exchanged"] if row["kind"] == "all-gather"]
    assert [row["devices"] for row in gathered] == [8]
    counted_bytes = sum(size for key, size in found.costs.exchanged.items() if key.kind == "all-gather")
    assert gathered[0]["bytes"] == pytest.approx(counted_bytes, rel=0.15)


def test_a_program_that_is_too_large_is_told_by_the_compiler():
    pytest.importorskip("libtpu")
    large = replace(STUDENT, model_size=16384, heads=128, kv_heads=128, layers=8)
    said = compiled(step(large, None, batch=8), topology("v5e:2x2"), Hardware(fsdp=4))
    assert said.used > said.limit > 15e9


def test_a_compiler_that_is_too_new_is_told_and_which_one_is_wanted(monkeypatch):
    def cannot():
        raise jax.errors.JaxRuntimeError("RET_CHECK failure: async-update should have 1 operands but sees 3")

    monkeypatch.setattr(steps, "version", lambda name: "0.0.99")
    with pytest.raises(UserError, match=r"libtpu 0\.0\.99 .* JAX .* cannot read: pip install 'libtpu==.*' *, or"):
        steps._text(SimpleNamespace(as_text=cannot))


def test_moments_on_the_host_leave_the_device_and_take_time():
    what, where = step(), topology("h100:8")
    away = replace(SHARDED, offload_optimizer=True)
    here, there = (Plan(what, where, one, counted(what, where, one)) for one in (SHARDED, away))
    assert there.memory["optimizer"] == 0
    assert there.counted.offloaded == pytest.approx(here.memory["optimizer"], rel=1e-3)
    assert there.seconds.memory > here.seconds.memory
