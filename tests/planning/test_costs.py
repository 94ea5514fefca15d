"""What a traced program is counted to do: closed forms, and the program that XLA makes of it."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from small_steps import OVER_ALL, STUDENT, on_virtual_devices, sizes, step

from epigone.lessons.objective import TEXT_ALONE
from epigone.models import decoder
from epigone.models.layers import save_nothing
from epigone.models.sharding import make_mesh
from epigone.planning.costs import Exchange, costs
from epigone.planning.hlo import exchanges
from epigone.planning.program import Program
from epigone.planning.steps import trace
from epigone.training.config import Hardware

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def counted(function, *arguments, sizes=MESH):
    return costs(Program(jax.jit(function).trace(*arguments).jaxpr.jaxpr, sizes))


def placed(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), P(*spec)))


def test_a_product_a_loop_and_a_call():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, length=5)[0]

    found = counted(loop, x, w, sizes={})
    assert found.flops == 5 * 2 * 8 * 16 * 16
    assert found.moved == 5 * 4 * (8 * 16 + 16 * 16 + 8 * 16)
    assert not found.exchanged


def test_exchanges_that_placements_ask_for():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        x, w = placed((8, 16), "data", None), placed((16, 32), "fsdp", "tensor")
        gathered = counted(lambda x, w: x @ jax.reshard(w, P(None, "tensor")), x, w)
        assert gathered.exchanged == {Exchange("all-gather", ("fsdp",)): 16 * 32 * 4 / 2}
        assert gathered.flops == 2 * 8 * 16 * 32 / 4

        up, down = placed((8, 32), "data", "tensor"), placed((32, 16), "tensor", None)
        summed = counted(lambda x, w: jnp.dot(x, w, out_sharding=P("data", None)), up, down)
        assert summed.exchanged == {Exchange("all-reduce", ("tensor",)): 8 * 16 * 4 / 2}
        assert summed.flops == 2 * 8 * 32 * 16 / 4

        def cut(x, y):
            return jax.reshard(jnp.dot(x.T, y, out_sharding=P(None, None)), P("data", None))

        scattered = counted(cut, x, placed((8, 4), "data", None))
        assert scattered.exchanged == {Exchange("reduce-scatter", ("data",)): 16 * 4 * 4}

        moved = counted(lambda x: jax.reshard(x, P(None, "data")), x)
        assert moved.exchanged == {Exchange("all-to-all", ("data",)): 8 * 16 * 4 / 2}
        assert not counted(lambda x: jax.reshard(x, P("data", "fsdp")), x).exchanged


def test_collectives_inside_a_shard_map():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        x = placed((8, 16), "data", None)

        def local(x):
            whole = jax.lax.all_gather(x, "data", axis=0, tiled=True)
            return jax.lax.psum(whole.sum(), "data")

        found = counted(jax.shard_map(local, in_specs=P("data"), out_specs=P()), x)
    assert found.exchanged == {Exchange("all-gather", ("data",)): 8 * 16 * 4, Exchange("all-reduce", ("data",)): 4}


@pytest.mark.parametrize("remat", [None, save_nothing], ids=["kept", "recomputed"])
def test_operations_are_those_of_the_model_with_whole_rows_of_scores(remat):
    """The formula counts the scores that are seen, half of them; products of a CPU make all."""
    config = replace(STUDENT, remat=remat)
    found = counted_step(step(config, None, objective=TEXT_ALONE), Hardware()).flops
    tokens, length = 16 * 128, 128
    s = config.sizes
    weights, _ = decoder.forward_flops(config, length)
    scores = 4 * s.L * s.N * s.H * length
    head = 2 * s.V * s.D
    last = 2 * s.L * s.F * s.D  # what a layer gives is not needed to differentiate it
    again = weights - head - last + scores if remat else 0
    assert found == pytest.approx(tokens * (3 * (weights + scores) + again), rel=0.01)


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 1, 1, 4), (1, 2, 2, 2)], ids=str)
def test_experts_are_counted_as_if_all_got_the_same(mesh):
    """Each token's own ones, wherever they are; and what an exchange of tokens along `expert` takes."""
    hardware = Hardware(*mesh)
    few = replace(STUDENT, experts=8, experts_per_token=2, ff_size=96)
    dense = replace(few, experts=None, ff_size=2 * 96)
    mixed, plain = (counted_step(step(one, None, objective=TEXT_ALONE), hardware) for one in (few, dense))
    tokens, s = 16 * 128, few.sizes
    router = 3 * 2 * s.L * s.D * 8 * tokens / (hardware.fsdp * hardware.tensor * hardware.expert)
    # The scores of all gathered tokens are made by each device of an exchange, over each part of the features.
    router *= hardware.expert * hardware.tensor
    assert mixed.flops == pytest.approx(plain.flops + router, rel=0.03)
    if hardware.sizes == (1, 1, 1, 1):
        own, alike = (decoder.forward_flops(one, 128)[0] for one in (few, dense))
        weighed = 2 * 2 * s.L * s.D  # what the two experts of a token say, times their weights: not in the formula
        assert mixed.flops - plain.flops == pytest.approx(3 * tokens * (own - alike + weighed), rel=0.001)
    if hardware.expert > 1:
        gathered = mixed.exchanged[Exchange("all-gather", ("expert",))]
        scattered = mixed.exchanged[Exchange("reduce-scatter", ("expert",))]
        of_tokens = 4 * s.L * s.D * tokens / hardware.fsdp
        # Forward and backward: what was gathered comes back as a sum that is scattered, and the other way round.
        assert gathered == pytest.approx(2 * of_tokens, rel=0.01)
        assert scattered == pytest.approx(2 * of_tokens, rel=0.01)


def counted_step(what, hardware):
    with jax.set_mesh(make_mesh(*hardware.sizes)):
        return costs(Program(trace(what, hardware).jaxpr.jaxpr, sizes(hardware)))


@pytest.mark.parametrize(
    "hardware",
    [Hardware(2, 2, 2, teacher=OVER_ALL, microbatches=2), Hardware(fsdp=8)],
    ids=["2x2x2", "1x8x1"],
)
def test_exchanges_are_those_of_the_compiled_program(hardware):
    traced, compiled = on_virtual_devices(step(), hardware)
    ours = costs(Program(traced.jaxpr.jaxpr, sizes(hardware)))
    theirs = exchanges(compiled.as_text())
    assert volume(ours.exchanged, "all-gather") == pytest.approx(volume(theirs.size, "all-gather"), rel=0.12)
    sums = ("all-reduce", "reduce-scatter")  # on a CPU all are all-reduces
    assert volume(ours.exchanged, *sums) == pytest.approx(volume(theirs.size, *sums), rel=0.12)
    assert volume(theirs.size, *sums) > 1e5


def volume(sizes: Counter, *kinds: str) -> float:
    return sum(size for exchange, size in sizes.items() if exchange.kind in kinds)
