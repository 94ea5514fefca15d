"""Speed between points, and the share of a device that it is."""

from types import SimpleNamespace

import numpy as np
import pytest
from training_toy import MODEL, run

from epigone.devices import CHIPS, Chip
from epigone.models import decoder
from epigone.models.sharding import make_mesh
from epigone.training import utilisation
from epigone.training.config import Hardware
from epigone.training.utilisation import Speed, peak_flops


def clock(monkeypatch, *times):
    left = iter(times)
    monkeypatch.setattr(utilisation, "time", SimpleNamespace(monotonic=lambda: next(left)))


def test_speed_is_what_was_done_since_the_last_point(monkeypatch):
    clock(monkeypatch, 100.0, 104.0, 105.0)
    speed = Speed(flops=6_000, peak=100_000.0)
    assert speed.at_point(10, 5_000) == {}
    ten = speed.at_point(20, 7_000)
    assert ten == pytest.approx({"tokens_per_second": 500.0, "flops_per_second": 15_000.0, "mfu": 0.15})
    five = speed.at_point(25, 7_900)
    assert five == pytest.approx({"tokens_per_second": 900.0, "flops_per_second": 30_000.0, "mfu": 0.3})


def test_without_a_peak_there_is_no_share_of_it(monkeypatch):
    clock(monkeypatch, 0.0, 1.0)
    speed = Speed(flops=1, peak=None)
    speed.at_point(1, 1)
    assert set(speed.at_point(2, 2)) == {"tokens_per_second", "flops_per_second"}


def mesh_of(kind, *shape):
    return SimpleNamespace(devices=np.full(shape, SimpleNamespace(device_kind=kind)), size=int(np.prod(shape)))


def test_the_peak_is_that_of_all_devices():
    assert peak_flops(mesh_of("TPU v5 lite", 2, 2, 4)) == 16 * 197e12
    assert peak_flops(mesh_of("NVIDIA H100 80GB HBM3", 1, 1, 1)) == 989.4e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v9"])
def test_a_device_that_is_not_in_the_table_has_none(kind):
    assert peak_flops(mesh_of(kind, 1, 1, 1)) is None


def test_on_these_devices_it_is_absent_and_in_the_table_it_is_there(monkeypatch, tmp_path):
    plain = run(tmp_path / "plain")
    assert peak_flops(make_mesh()) is None
    assert not any("mfu" in point for point in plain.curve)
    here = Chip("here", 1e9, 1.0, 1.0, 1.0)
    monkeypatch.setitem(CHIPS, make_mesh().devices.flat[0].device_kind, here)
    first, *points = run(tmp_path / "known", hardware=Hardware(data=4)).curve
    assert not {"mfu", "flops_per_second", "tokens_per_second"} & set(first)
    for point in points:
        assert point["mfu"] == pytest.approx(point["flops_per_second"] / 4e9)
    flops = decoder.flops_per_token(MODEL, 16, training=True) * 8 * 16
    seconds = [2 * flops / point["flops_per_second"] for point in points]
    spent = points[-1]["seconds"] - first["seconds"]
    assert sum(seconds) == pytest.approx(spent, rel=0.2, abs=0.01)
