"""Sums and counts add up; the curve holds means over intervals."""

import pytest

from epigone.training.metrics import Clock, Progress


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
