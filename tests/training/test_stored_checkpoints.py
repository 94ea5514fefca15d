"""Checkpoints in a bucket: equal to the bit, whole or not there, from any mesh to any mesh."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from object_stores import trouble
from toy_checkpoints import IDENTITY, equal, restore, state, with_steps
from training_toy import MODEL, losses, run

from epigone.errors import Fault, UserError
from epigone.models import decoder
from epigone.models.sharding import make_mesh
from epigone.storage.places import entries, write_whole
from epigone.training import stored_arrays
from epigone.training.checkpoint import Checkpointer, load_params, save_params
from epigone.training.sealed import Damaged, manifest_text, read_manifest


def object_of(directory, ending):
    return next(directory / name for name in entries(directory) if name.endswith(ending))


def test_arrays_of_every_kind_go_from_one_mesh_to_another(s3_folder):
    mesh, other = make_mesh(2, 2, 2), make_mesh(1, 8, 1)
    kinds = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_]
    arrays = {
        str(jnp.dtype(kind)): jax.device_put(
            jnp.arange(64).reshape(8, 8).astype(kind), NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
        )
        for kind in kinds
    }
    arrays |= {"scalar": jnp.float32(0.0), "none": jnp.zeros((0, 3)), "host": np.arange(5, dtype=np.int32)}
    stored_arrays.start_writing(s3_folder / "arrays", arrays)()
    placed = NamedSharding(other, P(None, "fsdp"))
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed if x.shape == (8, 8) else None)
        for name, x in arrays.items()
    }
    back = stored_arrays.read(s3_folder / "arrays", targets)
    assert equal(jax.tree.map(np.asarray, back), jax.tree.map(np.asarray, arrays))
    assert back["float32"].sharding == placed


def test_a_large_shard_is_several_objects():
    assert stored_arrays.chunk_shape((6, 4), 4) == (6, 4)
    assert stored_arrays.chunk_shape((6, 4), 4, most=50) == (3, 4)
    assert stored_arrays.chunk_shape((6, 4), 4, most=10) == (1, 2)
    assert stored_arrays.chunk_shape((7, 4), 4, most=50) == (1, 4)
    assert stored_arrays.chunk_shape((), 4, most=2) == ()


def test_large_arrays_are_cut_and_read_in_turns(s3_folder, monkeypatch):
    monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 64)
    monkeypatch.setattr(stored_arrays.chunk_shape, "__defaults__", (64,))
    monkeypatch.setattr(stored_arrays, "READ_BYTES", 100)
    arrays = {name: jax.random.normal(jax.random.key(i), (8, 6)) for i, name in enumerate("xyz")}
    stored_arrays.start_writing(s3_folder / "arrays", arrays)()
    assert max(entry.size for name, entry in entries(s3_folder).items() if "/c/" in name) == 2 * 6 * 4 + 4
    assert equal(stored_arrays.read(s3_folder / "arrays", arrays), arrays)


def test_parameters_come_back_to_the_bit_on_any_mesh(folder):
    params = decoder.init(MODEL, 3)
    save_params(folder / "model", params)
    assert equal(load_params(folder / "model", decoder.abstract(MODEL)), params)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        back = load_params(folder / "model", decoder.abstract(MODEL))
    assert equal(jax.tree.map(np.asarray, back), jax.tree.map(np.asarray, params))
    assert len({leaf.sharding.spec for leaf in jax.tree.leaves(back)}) > 1


def test_saving_again_replaces_in_one_step(s3_folder, monkeypatch):
    save_params(s3_folder, state(1))
    with monkeypatch.context() as patched:
        patched.setattr("epigone.training.sealed_in_bucket.write_whole", None)
        with pytest.raises(Fault, match="could not write"):
            save_params(s3_folder, state(2))
    assert equal(load_params(s3_folder, state(0)), state(1))
    save_params(s3_folder, state(3))
    assert equal(load_params(s3_folder, state(0)), state(3))
    assert len({name.partition("/")[0] for name in entries(s3_folder)}) == 2, "only one part is left"


def test_missing_and_foreign_parameters_are_told(s3_folder):
    with pytest.raises(Fault, match="no parameters in s3://"):
        load_params(s3_folder, state(1))
    save_params(s3_folder, state(1))
    with pytest.raises(UserError, match=r"'params.b_D' is float32\[16\] there and absent here"):
        load_params(s3_folder, {"step": jnp.int32(0), "params": {"a_DF": jnp.zeros((16, 8))}})


def test_the_last_two_are_kept_and_the_newest_is_used(folder):
    with_steps(folder, 3, 7, 11)
    assert {name.partition("/")[0] for name in entries(folder)} == {"step_00000007", "step_00000011"}
    restored, about = restore(folder)
    assert equal(restored, state(11))
    assert about == {"seen": 11}
    with pytest.raises(UserError, match=f"belongs to node identity {IDENTITY}, this node is ffff"):
        restore(folder, identity="ffff")
    assert restore(folder / "absent") is None


def test_what_is_saved_is_not_touched_by_a_step_that_reuses_the_memory(s3_folder):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    current = state(1)
    with trouble(latency=0.02):
        checkpoints = Checkpointer(s3_folder, IDENTITY)
        checkpoints.save(1, current, {})
        for _ in range(20):
            current = advance(current)
        checkpoints.close()
    assert equal(restore(s3_folder)[0], state(1))


def harm(step, how):
    path = object_of(step, "a_DF/c/0/0")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "flipped":
        write_whole(path, bytes(data))
    elif how == "short":
        write_whole(path, bytes(data[:-1]))
    elif how == "missing":
        path.unlink()
    elif how == "manifest":
        write_whole(step / "manifest.json", b"{")
    else:  # the store gives other bytes than it says that it has: only who reads them can know
        write_whole(path, bytes(data))
        manifest = read_manifest(step)
        manifest["files"] = entries(step / manifest["part"])
        write_whole(step / "manifest.json", manifest_text(manifest))


@pytest.mark.parametrize("how", ["flipped", "short", "missing", "manifest", "unseen"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(s3_folder, how):
    with_steps(s3_folder, 3, 7)
    harm(s3_folder / "step_00000007", how)
    with pytest.warns(UserWarning, match=r"step_00000007 is damaged .*using .*step_00000003"):
        restored, _ = restore(s3_folder)
    assert equal(restored, state(3))
    assert restore(s3_folder)[1] == {"seen": 3}
    assert any(name.startswith("step_00000007/") for name in entries(s3_folder)), "it is kept to look at"


@pytest.mark.parametrize("how", ["flipped", "unseen"])
def test_damaged_parameters_are_a_fault(s3_folder, how):
    save_params(s3_folder, state(1))
    harm(s3_folder, how)
    with pytest.raises(Fault, match=r"are damaged \(.*\): delete that directory and grow the node again"):
        load_params(s3_folder, state(1))


def test_damage_that_only_a_reader_sees_has_a_name(s3_folder):
    stored_arrays.start_writing(s3_folder, state(1)["params"])()
    write_whole(object_of(s3_folder, "b_D/c/0"), b"\0" * 68)
    with pytest.raises(Damaged, match="Digest mismatch"):
        stored_arrays.read(s3_folder, state(1)["params"])


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_removed(s3_folder):
    with_steps(s3_folder, 3)
    stored_arrays.start_writing(s3_folder / "step_00000007" / "0000abcd" / "arrays", {"b_D": jnp.zeros(16)})()
    assert restore(s3_folder)[1] == {"seen": 3}
    assert {name.partition("/")[0] for name in entries(s3_folder)} == {"step_00000003"}


def test_nothing_is_read_to_seal_or_to_find_what_is_whole(s3_folder):
    with trouble() as met:
        with_steps(s3_folder, 3)
        assert not [request for request in met.requests if request.startswith("GET") and "/c" in request]
    with trouble() as met:
        restore(s3_folder)
        read = [request for request in met.requests if request.startswith("GET") and "/c" in request]
    assert len(read) == len(set(read)) == 3, "each array once"


def test_a_store_that_refuses_is_one_line_and_harms_nothing(s3_folder):
    with_steps(s3_folder, 3)
    checkpoints = Checkpointer(s3_folder, IDENTITY)
    with trouble(failing=1.0, status=403, matching="PUT"):
        checkpoints.save(7, state(7), {})
        with pytest.raises(Fault, match=r"could not write .*step_00000007: no permission for s3://bucket"):
            checkpoints.close()
    assert restore(s3_folder)[1] == {"seen": 3}


def test_a_busy_store_is_asked_again(folder):
    with trouble(latency=0.005, failing=0.3, matching="arrays") as met:
        with_steps(folder, 3)
        assert equal(restore(folder)[0], state(3))
    assert met.failed


def test_two_processes_write_one_checkpoint_and_one_goes_on_from_it(s3_folder, stores, tmp_path):
    """They share nothing but the bucket. One gets SIGTERM: both stop at one step, and a single process finishes."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    child = [sys.executable, str(Path(__file__).with_name("child.py")), str(s3_folder)]
    outputs = [tmp_path / f"{number}" for number in (0, 1)]
    both = []
    for number, output in enumerate(outputs):
        how = [
            "--process",
            str(number),
            "2",
            str(port),
            "--terminate",
            "99" if number else "4",
            "--pace",
            "0.3",
            "--axis",
            "fsdp",
        ]
        environment = os.environ | stores | {"XDG_CACHE_HOME": str(tmp_path / f"cache{number}")}
        with output.open("w") as file:
            both.append(subprocess.Popen([*child, *how], env=environment, stdout=file, stderr=subprocess.STDOUT))
    said = [output.read_text() for output, process in zip(outputs, both, strict=True) if process.wait(timeout=100) == 0]
    stopped = [int(found.group(1)) for text in said if (found := re.search(r"stopped at step (\d+) of 12", text))]
    assert len(stopped) == 2, said
    assert stopped[0] == stopped[1]
    assert [name for name in entries(s3_folder) if name.endswith(("/c/1/0", "/c/0/1"))], "shards of the second"
    seen = []
    resumed = run(s3_folder, on_step=lambda report: seen.append(report.step))
    assert seen[0] == stopped[0] + 1
    np.testing.assert_allclose(losses(resumed), losses(run(tmp_path / "undisturbed")), rtol=1e-5)
