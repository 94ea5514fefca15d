"""Sums and counts add up; the curve holds means over intervals; events can be read back."""

import pytest
from tensorboardX.proto.event_pb2 import Event

from epigone.training.metrics import Clock, Events, Progress


def test_a_point_is_the_mean_over_tokens_not_over_steps():
    progress = Progress()
    progress.add({"loss": (10.0, 1.0), "gradient_norm": (4.0, 1.0)})
    progress.add({"loss": (9.0, 9.0), "gradient_norm": (2.0, 1.0)})
    point = progress.close(2)
    assert point["loss"] == pytest.approx(19.0 / 10.0)
    assert point["gradient_norm"] == pytest.approx(3.0)
    assert point["tokens"] == 10
    average_of_averages = (10.0 + 1.0) / 2
    assert point["loss"] != pytest.approx(average_of_averages)


def test_what_was_not_measured_is_absent():
    progress = Progress()
    progress.add({"loss": (1.0, 1.0)})
    assert set(progress.close(1)) == {"step", "tokens", "seconds", "loss"}


def test_what_else_is_known_of_a_point_is_in_it():
    progress = Progress()
    progress.add({"loss": (1.0, 1.0)})
    assert progress.close(1, mfu=0.25)["mfu"] == 0.25
    progress.add({"loss": (1.0, 1.0)})
    assert "mfu" not in progress.close(2)


def test_time_goes_on_from_an_earlier_run():
    progress = Progress(seconds=100.0)
    progress.add({"loss": (5.0, 50.0)})
    assert Clock(progress).tick() == 0.0
    assert 100.0 <= progress.seconds < 101.0


def records(path):
    """Event records: length (8 bytes), checksum (4), data, checksum (4)."""
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_events_hold_the_points(tmp_path):
    events = Events(tmp_path, active=True)
    events.write({"step": 10, "loss": 2.5, "tokens": 640})
    events.write({"step": 20, "loss": 2.25, "tokens": 1280})
    events.close()
    (path,) = tmp_path.iterdir()
    read = {(v.tag, e.step): v.simple_value for e in records(path) for v in e.summary.value}
    assert read[("loss", 20)] == 2.25
    assert read[("tokens", 10)] == 640


def test_only_one_process_writes_events(tmp_path):
    events = Events(tmp_path / "events", active=False)
    events.write({"step": 1, "loss": 1.0})
    events.close()
    assert not (tmp_path / "events").exists()
