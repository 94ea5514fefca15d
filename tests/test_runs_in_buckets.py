"""A run in a bucket is the run on a disk: the same numbers to the bit, killed or slow; every verb reads it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from object_stores import trouble
from tiny import Silent, write_config

from epigone.cli import main
from epigone.grow import grow
from epigone.opened import open_node
from epigone.storage import claims
from epigone.storage.places import entries, place
from epigone.store import Store
from epigone.verbs.run import load_config

NODES = ["trigram@0", "teacher@0", "student@1", "reader@1"]
FLAGS = ["--steps", "4", "--generations", "0"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def lineage(config):
    return load_config(config)(steps=4, generations=0)


@pytest.fixture(scope="module")
def on_disk(lineage, tmp_path_factory):
    run = tmp_path_factory.mktemp("disk") / "run"
    grow(lineage, run, view=Silent())
    return run


@pytest.fixture(scope="module")
def in_bucket(lineage, stores):
    """The run, grown in a store that is slow and busy; and how many requests failed."""
    run = place(f"s3://bucket/runs-{os.getpid()}/x")
    with trouble(latency=0.002, failing=0.03) as met:
        assert grow(lineage, run, view=Silent()) == [node.key for node in lineage.order]
    return run, met.failed


@pytest.fixture(autouse=True)
def another_host(tmp_path, monkeypatch):
    """Nothing is in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers(lineage, run, key):
    """What a run found of a node, without what clocks and places say."""
    times = {"seconds", "tokens_per_second", "flops_per_second", "mfu"}
    record = Store(run, lineage).record(lineage[key])
    curve = [{name: value for name, value in point.items() if name not in times} for point in record.get("curve", [])]
    return [curve, *(record[name] for name in ("metrics", "data", "tokens", "parameters", "samples"))]


def weights(run, key):
    model = open_node(f"{run}/{key}").model
    params = getattr(model, "params", None)
    if params is None:
        return [mass.weights_E for mass in model.masses]
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def assert_same(lineage, run, other, keys=NODES):
    for key in keys:
        assert json.dumps(numbers(lineage, run, key)) == json.dumps(numbers(lineage, other, key))
        for a, b in zip(weights(run, key), weights(other, key), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=key)


def test_the_same_to_the_bit_though_the_store_is_slow_and_busy(lineage, on_disk, in_bucket):
    run, failed = in_bucket
    assert failed > 5
    assert_same(lineage, on_disk, run)
    assert grow(lineage, run, view=Silent()) == []
    names = list(entries(run.parent))
    assert not [name for name in names if "/checkpoints/" in name or name.endswith(("/lock", ".tmp", ".partial"))]
    assert any("/training/events/" in name for name in names)


def test_google_cloud_storage_too_and_from_another_host(lineage, on_disk, stores, request, tmp_path, monkeypatch):
    run = place(f"gs://bucket/{tmp_path.name}/x")
    few = [node for node in lineage.nodes if node.key in ("trigram@0", "teacher@0")]
    for node in few:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # each is grown by a host that has nothing
        assert grow(lineage, run, only=node.key, view=Silent()) == [node.key]
        assert weights(run, node.key)[0].tobytes() == weights(on_disk, node.key)[0].tobytes()


def test_every_verb_reads_it(config, in_bucket, tmp_path, capsys):
    run = str(in_bucket[0])
    assert main(["run", str(config), "--run", run, *FLAGS]) == 0
    shown = capsys.readouterr().out
    assert f"report: {run}/report.html" in shown
    assert "all 4 nodes are done, nothing to grow" in shown
    assert main(["run", str(config), "--run", run, *FLAGS, "--dry-run"]) == 0
    assert "4 nodes, 4 done" in capsys.readouterr().out
    assert main(["report", run]) == 0
    written = set(entries(in_bucket[0]))
    assert {"report.html", "results.json", "results.csv", "lineage.json"} <= written
    assert b"<html" in (in_bucket[0] / "report.html").read_bytes()
    assert any(name.startswith("plots/") for name in written)
    capsys.readouterr()
    assert main(["sample", f"{run}/teacher@0", "--n", "1", "--max-length", "5"]) == 0
    assert main(["sample", "trigram", "--run", run, "--n", "1"]) == 0
    assert capsys.readouterr().out.strip()
    corpus = str(config.parent / "corpus.txt")
    assert main(["evaluate", f"{run}/student", "--on", corpus, "--teacher", f"{run}/teacher", "--tokens", "200"]) == 0
    assert main(["export", f"{run}/teacher", "--to", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "config.json").exists()


def test_a_run_that_was_killed_goes_on_to_the_bit(config, lineage, on_disk, s3_folder, stores, tmp_path):
    """Killed while the teacher is trained, with a checkpoint a step; what the killed process claimed is no obstacle."""
    run = s3_folder / "x"
    flags = [*FLAGS, "--hardware.checkpoint-every-steps", "1", "--node", "teacher@0"]
    command = [sys.executable, "-m", "epigone", "run", str(config), "--run", str(run), *flags]
    process = subprocess.Popen(command, env=os.environ | stores, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not any("/checkpoints/step_0000000" in name for name in entries(run)):
        pass
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert any(name.endswith("/lock") for name in entries(run)), "its claims are still there"
    grow(lineage, run, only="teacher@0", view=Silent())
    assert_same(lineage, on_disk, run, ["teacher@0"])


def test_two_runs_at_once_are_told(lineage, s3_folder, config, capsys, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    run = s3_folder / "x"
    with Store(run, lineage).lock(), pytest.warns(UserWarning, match="is claimed by process"):
        assert main(["run", str(config), "--run", str(run)]) == 2
    assert f"epigone: {run} is being grown by process {os.getpid()} on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "s3://absent/x"], "there is no bucket 'absent' in s3://: make it first"),
        (["report", "gs://bucket"], "'gs://bucket' names no folder in a bucket: give gs://BUCKET/FOLDER"),
        (["report", "s3://bucket/none"], "no lineage.json in 's3://bucket/none'"),
        (["sample", "s3://bucket/none/teacher@0"], "no run in s3://bucket/none"),
        (["run", "CONFIG", "--run", "s3://absent/x"], "there is no bucket 'absent'"),
        (["run", "CONFIG", "--run", "runs/x", "--data", "ftp://x/y"], "no store is known by 'ftp://'"),
    ],
)
def test_bad_places_are_one_line(arguments, message, config, stores, capsys):
    assert main([str(config) if word == "CONFIG" else word for word in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_bucket_that_may_only_be_read_is_one_line(config, s3_folder, capsys):
    with trouble(failing=1.0, status=403, matching="PUT"):
        assert main(["run", str(config), "--run", str(s3_folder / "x")]) == 1
    assert "no permission for s3://bucket: ask for read and write access" in capsys.readouterr().err
