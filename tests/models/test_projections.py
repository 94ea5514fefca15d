"""Products with matrices: in the shorter type, with gradients that are summed in the longer one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_steps import STUDENT, sizes, step

from epigone.models.projections import project
from epigone.models.rules import Sharding
from epigone.models.sharding import make_mesh
from epigone.planning.program import Program
from epigone.planning.steps import trace
from epigone.training.config import Hardware

CONFIG = replace(STUDENT, dtype="bfloat16")
NAMES = ("query_LDNH", "key_LDKH", "mix_LNHD", "up_LDF", "down_LFD")


def operands(name, tokens=(4, 512)):
    s = CONFIG.sizes._asdict()
    shape = tuple(s[letter] for letter in name.rsplit("_", 1)[1][1:])
    inputs = shape[:-1] if name.endswith("D") else shape[:1]
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (*tokens, *inputs), jnp.bfloat16), jax.random.normal(keys[1], shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_of_a_longer_type_gets_its_gradient_in_that_type(name):
    """To the exact sum within float32's error, where bfloat16 has three digits."""
    x, weight = operands(name)

    def total(weight):
        y = project(CONFIG, Sharding(), {name: weight}, x, name)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))(weight)
    exact = np.asarray(x, np.float64).sum((0, 1))
    wanted = np.broadcast_to(exact[(..., *[None] * (weight.ndim - exact.ndim))], weight.shape)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-3)
    assert np.abs(np.asarray(wanted, jnp.bfloat16) - wanted).max() > 0.02


def summed_over_devices(program):
    """(type, axes) of every product whose partial sums lie on different parts of the batch."""
    for operation in program.operations:
        if operation.name == "dot_general":
            (left, _), _ = operation.params["dimension_numbers"]
            axes = {axis for dim in left for axis in program.spec(operation.inputs[0])[dim]}
            if axes & {"data", "fsdp"}:
                yield str(operation.outputs[0].aval.dtype), axes
        if operation.name == "scan":
            yield from summed_over_devices(program.inside(operation.bodies[0]))


@pytest.mark.parametrize(("products", "weights"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_on_a_mesh_all_gradients_of_matrices_are_summed_in_float32(products, weights):
    """In the longer of the two types: those of shorter weights are rounded when they are whole."""
    hardware, config = Hardware(2, 2, 2), replace(CONFIG, dtype=products, weights_dtype=weights)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        traced = trace(step(config, config), hardware)
    found = list(summed_over_devices(Program(traced.jaxpr.jaxpr, sizes(hardware))))
    assert len(found) == 7  # those of attention and feed-forward
    assert {dtype for dtype, _ in found} == {"float32"}
