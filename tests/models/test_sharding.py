"""One model on many meshes: the same logits and gradients, every array where it was declared to be, clear refusals."""

import dataclasses

import jax
import numpy as np
import pytest
from decoder_variants import VARIANTS, rows
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.decoder import abstract, apply, init
from epigone.models.sharding import Sharding, batch_parts, check, check_batch, make_mesh

CONFIG = dataclasses.replace(
    VARIANTS["gpt2"], model_size=32, heads=8, head_size=4, ff_size=64, vocab_size=61, qk_norm=True, tied=False
)
BATCH = rows(CONFIG, B=8)


def loss(params, batch):
    return jax.nn.log_softmax(apply(CONFIG, params, *batch))[..., 5].mean()


def results():
    """Parameters, logits, gradients on the mesh that is set."""
    batch = [jax.device_put(x, P(("data", "fsdp"))) if not jax.sharding.get_mesh().empty else x for x in BATCH]
    params = init(CONFIG, 0)
    both = jax.jit(lambda params, batch: (apply(CONFIG, params, *batch), jax.grad(loss)(params, batch)))
    return params, *both(params, batch)


@pytest.fixture(scope="module")
def without_mesh():
    return jax.tree.map(np.asarray, results())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 4)], ids=str)
def test_every_mesh_gives_the_same(sizes, without_mesh):
    with jax.set_mesh(make_mesh(*sizes)):
        on_mesh = results()
        targets = abstract(CONFIG)
    for value, expected in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(without_mesh), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    params, logits, gradients = on_mesh
    for target, *real in zip(*(jax.tree.leaves(x) for x in (targets, params, gradients)), strict=True):
        assert all(x.sharding == target.sharding for x in real)
    data, fsdp, tensor = sizes
    embedding = params["outer"]["embedding_VD"][...]
    assert embedding.addressable_shards[0].data.shape == (64 // tensor, 32 // fsdp)
    query = params["layers"]["query_LDNH"][...]
    assert query.addressable_shards[0].data.shape == (2, 32 // fsdp, 8 // tensor, 4)
    assert logits.addressable_shards[0].data.shape[0] == 8 // (data * fsdp)


@pytest.mark.parametrize("name", ["olmo2", "gemma3", "qwen3_moe", "qwen2"])
def test_every_family_gives_the_same_on_a_mesh(name):
    """The mesh cuts what a family adds: a norm over all heads, angles of two kinds, experts, biases."""
    config = dataclasses.replace(VARIANTS[name], layers=2, window_pattern=(True, False), max_length=64)
    batch = rows(config, B=4)

    def both(params, batch):
        loss = lambda p: jax.nn.log_softmax(apply(config, p, *batch))[..., 5].mean()  # noqa: E731
        return apply(config, params, *batch), jax.grad(loss)(params)

    alone = jax.jit(both)(init(config, 0), batch)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = init(config, 0)
        on_mesh = jax.jit(both)(params, [jax.device_put(x, P(("data", "fsdp"))) for x in batch])
        same = jax.tree.map(lambda gradient, weight: gradient.sharding == weight.sharding, on_mesh[1], params)
    assert all(jax.tree.leaves(same))
    for value, expected in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_logits_stay_cut_when_no_row_is_padded():
    config = dataclasses.replace(CONFIG, vocab_size=64)
    with jax.set_mesh(make_mesh(tensor=4)):
        logits = jax.jit(apply, static_argnums=0)(config, init(config, 0), *BATCH)
        assert logits.sharding.spec == P(("data", "fsdp", "expert"), None, "tensor")


def test_rules_by_letter():
    sharding = Sharding()
    assert sharding.weight("LDNH") == P(None, "fsdp", "tensor", None)
    assert sharding.gathered("LDNH") == P(None, None, "tensor", None)
    assert sharding.activation("BTD") == P(("data", "fsdp", "expert"), None, None)
    assert sharding.weight("LEDF") == P(None, "expert", "fsdp", "tensor")
    with jax.set_mesh(make_mesh(2, 2)):
        assert batch_parts(sharding) == 4
        assert batch_parts(Sharding(B=("data",))) == 2
        assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(abstract(CONFIG)))
    assert batch_parts(sharding) == 1


def test_refusals_name_the_numbers():
    with pytest.raises(UserError, match=r"axes V and D of an array VD are both on mesh axis 'tensor'"):
        init(CONFIG, 0, Sharding(D=("tensor",)))
    with jax.set_mesh(make_mesh(tensor=3)), pytest.raises(UserError, match=r"N has size 8, which tensor = 3"):
        check(Sharding(V=()), {"query_LDNH": (2, 32, 8, 4)})
    with jax.set_mesh(make_mesh(tensor=3)), pytest.raises(UserError, match="does not divide"):
        init(CONFIG, 0)
    mesh = make_mesh(2, 2)
    check_batch(Sharding(), 8, mesh)
    with pytest.raises(UserError, match=r"size 6, which data x fsdp x expert = 4"):
        check_batch(Sharding(), 6, mesh)
    with pytest.raises(UserError, match="'model' does not exist"):
        check(Sharding(F=("model",)), {"up_LDF": (2, 32, 64)}, mesh)
    with pytest.raises(UserError, match=r"up_LEDF: axis E has size 6, which expert = 4 does not divide"):
        check(Sharding(), {"up_LEDF": (2, 6, 32, 64)}, make_mesh(expert=4))
    with pytest.raises(UserError, match=r"axes E and D of an array LEDF are both on mesh axis 'expert'"):
        check(Sharding(D=("expert",)), {"up_LEDF": (2, 6, 32, 64)}, make_mesh(expert=2))
    with pytest.raises(UserError, match=r"needs 64 devices, and there are 8"):
        make_mesh(4, 4, 4)
    with pytest.raises(UserError, match="at least 1"):
        make_mesh(0)
