"""From counts to memory, time and money, by hand."""

from collections import Counter
from dataclasses import replace

import pytest
from small_steps import STUDENT, TEACHER, step

from epigone.data.corpora import Embedded
from epigone.lineage import Text
from epigone.models import decoder
from epigone.planning.alive import Alive
from epigone.planning.costs import Costs, Exchange
from epigone.planning.estimate import REACHED, Plan
from epigone.planning.hlo import Exchanged, Group
from epigone.planning.steps import Compiled, Counted, model_flops
from epigone.planning.topologies import topology
from epigone.training.config import Hardware

V5E = topology("v5e:4x4")
CHIP = V5E.chip
COSTS = Costs(
    flops=CHIP.flops * 7.0, moved=CHIP.bandwidth * 2.0, exchanged=Counter({Exchange("all-gather", ("fsdp",)): 15e9})
)
ALONE, TEACHING = replace(COSTS, flops=CHIP.flops * 2.1), Costs(flops=CHIP.flops * 4.9)
ARGUMENTS = {"weights": 1e9, "optimizer": 2e9, "average": 0.0, "frozen": 0.0, "teacher": 3e9, "batch": 0.0}
COUNTED = Counted(COSTS, Alive(4e9, ()), ARGUMENTS, kept=1.5e9, offloaded=0.0, without=ALONE, teaching=TEACHING)
HARDWARE = Hardware(fsdp=16)


def plan(price=None, compiled=None, text=(), steps=10, counted=COUNTED):
    return Plan(step(text=text, steps=steps), V5E, HARDWARE, counted, compiled, price)


def test_memory_by_kind():
    by_formula = plan()
    assert by_formula.memory["gradients"] == 1e9
    assert by_formula.memory["temporaries"] == 4e9 - 1e9 - 1.5e9
    assert by_formula.used == sum(ARGUMENTS.values()) + 4e9
    assert by_formula.limit == 0.9 * CHIP.memory
    assert by_formula.fits
    assert not plan(counted=replace(COUNTED, alive=Alive(11e9, ()))).fits


def test_what_the_compiler_says_counts():
    said = plan(compiled=Compiled(temporaries=5e9, arguments=6.5e9, exchanged=Exchanged(Counter(), Counter())))
    assert said.used == 6.5e9 + 5e9
    assert said.limit == CHIP.memory
    refused = plan(compiled=Compiled(used=20e9, limit=15.75e9))
    assert not refused.fits
    assert refused.used == pytest.approx(20e9)


def test_the_roofline():
    seconds = plan().seconds
    assert (seconds.compute, seconds.memory) == (7.0, 2.0)
    # 15 GB gathered among 16 chips of a 4x4 torus without rings: over two links of 50 GB/s.
    assert seconds.interconnect == pytest.approx(15e9 * 15 / 16 / 100e9)
    assert seconds.bound == "compute"
    assert seconds.shortest == 7.0
    assert seconds.longest == pytest.approx(7.0 / REACHED["tpu"] + seconds.interconnect)
    assert seconds.shortest < seconds.expected < seconds.longest
    sums = Exchanged(Counter({Group("all-reduce", 16): 15e9}), Counter({Group("all-reduce", 16): 1}))
    assert plan(compiled=Compiled(1.0, 1.0, sums)).seconds.interconnect == pytest.approx(2 * seconds.interconnect)


def test_utilisation_and_speed_are_of_all_devices():
    told = plan(price=1.5).as_json()
    seconds = told["seconds"]["expected"]
    assert told["tokens_per_step"] == 16 * 128
    assert told["tokens_per_second"] == pytest.approx(16 * 128 / seconds)
    models = (
        16
        * 128
        * (decoder.flops_per_token(STUDENT, 128, training=True) + decoder.flops_per_token(TEACHER, 128, training=False))
    )
    assert model_flops(step()) == models
    assert told["mfu"]["expected"] == pytest.approx(models / (16 * CHIP.flops * seconds))
    assert told["run"]["chip_hours"] == pytest.approx(10 * seconds * 16 / 3600)
    assert told["run"]["cost"] == pytest.approx(1.5 * told["run"]["chip_hours"])


def test_kept_scores_pay_where_a_text_is_read_again():
    once, often = (plan(text=(Text(Embedded("bbe"), tokens=16 * 128 * 10 // passes),)).scores for passes in (1, 5))
    assert once["passes_over_the_text"] == pytest.approx(1, rel=0.01)
    assert often["passes_over_the_text"] == pytest.approx(5, rel=0.01)
    assert (once["cheaper"], often["cheaper"]) == ("streamed", "cached")
    assert often["cached_chip_hours"] < 0.6 * often["streamed_chip_hours"]
    assert plan(text=(Text(Embedded("bbe")),)).scores["passes_over_the_text"] is None
    assert Plan(step(teacher=None), V5E, HARDWARE, COUNTED).scores is None
