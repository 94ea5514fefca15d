"""Checkpoints: equal to the bit, whole or invisible, and what is damaged or foreign is named in one line."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_checkpoints import IDENTITY, equal, restore, state, with_steps
from training_toy import MODEL

from epigone.errors import Fault, UserError
from epigone.models import decoder
from epigone.models.sharding import make_mesh
from epigone.training import sealed_on_disk
from epigone.training.checkpoint import Checkpointer, load_params, save_params
from epigone.training.sealed import Damaged, read_manifest


def largest(directory):
    return max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(directory):
    """Flip one bit in the middle of the largest file."""
    path = largest(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_parameters_come_back_to_the_bit_on_any_mesh(tmp_path):
    params = decoder.init(MODEL, 3)
    save_params(tmp_path / "model", params)
    assert equal(load_params(tmp_path / "model", decoder.abstract(MODEL)), params)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        back = load_params(tmp_path / "model", decoder.abstract(MODEL))
    assert equal(jax.tree.map(np.asarray, back), jax.tree.map(np.asarray, params))
    assert len({leaf.sharding.spec for leaf in jax.tree.leaves(back)}) > 1


def test_saving_again_replaces(tmp_path):
    for seed in (1, 2):
        save_params(tmp_path / "model", state(seed))
    assert equal(load_params(tmp_path / "model", state(0)), state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_damaged_parameters_are_a_fault(tmp_path):
    save_params(tmp_path / "model", state(1))
    damage(tmp_path / "model")
    with pytest.raises(Fault, match=r"model are damaged \(.*checksum.*\): delete"):
        load_params(tmp_path / "model", state(1))


def test_missing_parameters_are_a_fault(tmp_path):
    with pytest.raises(Fault, match="no parameters in"):
        load_params(tmp_path / "model", state(1))


def test_parameters_of_another_model_are_refused(tmp_path):
    save_params(tmp_path / "model", state(1))
    other = {"step": jnp.int32(0), "params": {"a_DF": jnp.zeros((16, 9)), "b_D": jnp.zeros(16)}}
    with pytest.raises(UserError, match=r"'params.a_DF' is float32\[16, 8\] there and float32\[16, 9\] here"):
        load_params(tmp_path / "model", other)
    with pytest.raises(UserError, match=r"'params.b_D' is float32\[16\] there and absent here"):
        load_params(tmp_path / "model", {"step": jnp.int32(0), "params": {"a_DF": jnp.zeros((16, 8))}})


def test_the_last_two_are_kept_and_the_newest_is_used(tmp_path):
    with_steps(tmp_path, 3, 7, 11)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000007", "step_00000011"]
    restored, about = restore(tmp_path)
    assert equal(restored, state(11))
    assert about == {"seen": 11}


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "absent") is None


def test_what_is_saved_is_not_touched_by_a_step_that_reuses_the_memory(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    current = state(1)
    checkpoints = Checkpointer(tmp_path, IDENTITY)
    checkpoints.save(1, current, {})
    for _ in range(20):
        current = advance(current)
    checkpoints.close()
    assert equal(restore(tmp_path)[0], state(1))


@pytest.mark.parametrize("how", ["bit", "truncated", "missing", "manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    with_steps(tmp_path, 3, 7)
    newest = tmp_path / "step_00000007"
    data = largest(newest)
    if how == "bit":
        damage(newest)
    elif how == "truncated":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "missing":
        data.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match=r"step_00000007 is damaged .*using .*step_00000003"):
        restored, _ = restore(tmp_path)
    assert equal(restored, state(3))
    assert restore(tmp_path)[1] == {"seen": 3}


def test_when_all_are_damaged_training_starts_again(tmp_path):
    with_steps(tmp_path, 3, 7)
    damage(tmp_path / "step_00000003")
    damage(tmp_path / "step_00000007")
    with pytest.warns(UserWarning, match="is damaged") as told:
        assert restore(tmp_path) is None
    assert "starting at step 0" in str(told[-1].message)


def test_a_checkpoint_of_another_node_is_refused_and_left_alone(tmp_path):
    with_steps(tmp_path, 3)
    with pytest.raises(UserError, match=f"belongs to node identity {IDENTITY}, this node is ffff"):
        restore(tmp_path, identity="ffff")
    assert equal(restore(tmp_path)[0], state(3))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with_steps(tmp_path, 3)
    with pytest.raises(UserError, match="is of another model"):
        restore(tmp_path, {"step": jnp.int32(0), "params": {"a_DF": jnp.zeros((16, 8))}})


def test_what_a_killed_writer_left_is_ignored_and_removed(tmp_path):
    with_steps(tmp_path, 3)
    left = tmp_path / ".step_00000007.tmp" / "arrays"
    left.mkdir(parents=True)
    (left / "part").write_text("half")
    assert restore(tmp_path)[1] == {"seen": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, monkeypatch):
    with_steps(tmp_path, 3)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(sealed_on_disk, "sealed_as", full)
    checkpoints = Checkpointer(tmp_path, IDENTITY)
    checkpoints.save(7, state(7), {})
    with pytest.raises(Fault, match=r"could not write .*step_00000007: .*No space left"):
        checkpoints.close()
    monkeypatch.undo()
    assert restore(tmp_path)[1] == {"seen": 3}


def test_restored_arrays_lie_where_they_are_asked_for(tmp_path):
    with_steps(tmp_path, 3)
    mesh = make_mesh(1, 8, 1)
    placed = NamedSharding(mesh, P("fsdp", None))
    abstract = jax.eval_shape(lambda: state(0))
    abstract["params"]["a_DF"] = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=placed)
    restored, _ = restore(tmp_path, abstract)
    assert restored["params"]["a_DF"].sharding == placed
    assert equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state(3)))


def test_the_manifest_says_what_it_is(tmp_path):
    with_steps(tmp_path, 3)
    manifest = read_manifest(tmp_path / "step_00000003")
    assert manifest["identity"] == IDENTITY
    assert manifest["step"] == 3
    assert manifest["arrays"]["params.a_DF"] == [[16, 8], "float32"]


def test_no_bit_of_the_manifest_can_change_and_no_byte_be_missing(tmp_path):
    with_steps(tmp_path, 3)
    path = tmp_path / "step_00000003" / "manifest.json"
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for harmed in [*flipped, *(whole[:at] for at in range(len(whole))), whole + b"\n"]:
        path.write_bytes(harmed)
        with pytest.raises(Damaged, match=r"manifest.json is missing or unreadable"):
            read_manifest(path.parent)
    path.write_bytes(whole)
    assert read_manifest(path.parent)["about"] == {"seen": 3}
