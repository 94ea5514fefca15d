"""The most that a traced program holds at once: closed forms, and XLA's own count."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from small_steps import OVER_ALL, STUDENT, TEACHER, on_virtual_devices, sizes, step

from epigone.models.layers import save_nothing
from epigone.planning.alive import peak
from epigone.planning.program import Program
from epigone.planning.steps import kept
from epigone.training.config import Hardware

KB = 1024


def held(function, *arguments):
    return peak(Program(jax.jit(function).trace(*arguments).jaxpr.jaxpr, {})).size


def test_results_of_products_live_until_their_last_use():
    x = jnp.ones((16, 16))  # 1 KB
    assert held(lambda x: x @ x, x) == KB
    assert held(lambda x: (x @ x) @ x, x) == 2 * KB
    assert held(lambda x: ((x @ x) @ x) @ x, x) == 2 * KB

    def keeps(x):
        first = x @ x
        return first + (first @ x) @ x

    assert held(keeps, x) == 3 * KB


def test_what_is_elementwise_is_fused_into_its_use():
    x = jnp.ones((16, 16))
    assert held(lambda x: jnp.exp(jnp.sin(x) * 2 + 1).sum(), x) == 4
    assert held(lambda x: jnp.tanh(x @ x) @ x, x) == 2 * KB


def test_results_may_take_the_places_of_arguments():
    x = jnp.ones((16, 16))
    program = Program(jax.jit(lambda x: x * 0.9 + (x @ x) * 0.1).trace(x).jaxpr.jaxpr, {})
    assert (peak(program).size, peak(program, in_place=True).size) == (2 * KB, KB)


def test_a_loop_holds_what_it_stacks_and_one_turn():
    x = jnp.ones((16, 16))

    def stacked(x):
        return jax.lax.scan(lambda x, _: (x @ x, jnp.sin(x)), x, length=8)

    assert 9 * KB <= held(stacked, x) <= 11 * KB


def test_what_is_kept_for_the_backward_pass():
    """Of each layer its input alone where all else is computed again; much more where nothing is."""
    few, many = (
        kept(Program(on_one_device(step(replace(STUDENT, remat=remat)))[0].jaxpr.jaxpr, sizes(Hardware())))
        for remat in (save_nothing, None)
    )
    inputs = STUDENT.layers * 16 * 128 * STUDENT.model_size * 4
    assert inputs <= few <= 1.3 * inputs
    assert many > 5 * few


def on_one_device(what):
    return on_virtual_devices(what, Hardware())


@pytest.mark.parametrize(
    ("hardware", "student"),
    [(Hardware(), STUDENT), (Hardware(2, 2, 2, teacher=OVER_ALL), replace(STUDENT, remat=save_nothing))],
    ids=["1", "2x2x2, recomputed"],
)
def test_near_to_what_the_compiler_holds(hardware, student):
    traced, compiled = on_virtual_devices(step(student, TEACHER), hardware)
    ours = peak(Program(traced.jaxpr.jaxpr, sizes(hardware)), in_place=True).size
    theirs = compiled.memory_analysis().temp_size_in_bytes
    assert 0.6 * theirs < ours < 1.5 * theirs
