"""A small state, and checkpoints of it."""

import jax
import jax.numpy as jnp
import numpy as np

from epigone.training.checkpoint import Checkpointer

IDENTITY = "0123456789abcdef"


def state(seed):
    key = jax.random.key(seed)
    return {"step": jnp.int32(seed), "params": {"a_DF": jax.random.normal(key, (16, 8)), "b_D": jnp.zeros(16)}}


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


def with_steps(directory, *steps):
    checkpoints = Checkpointer(directory, IDENTITY)
    for step in steps:
        checkpoints.save(step, state(step), {"seen": step})
    checkpoints.close()
    return checkpoints


def restore(directory, abstract=None, identity=IDENTITY):
    return Checkpointer(directory, identity).restore(state(0) if abstract is None else abstract)
