import pytest

from epigone.lessons import chunks


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        (4096, 1046, (4, 1024)),
        (4096, 877, (8, 512)),  # five chunks of 896 would hold 4,480 tokens
        (1000, 1046, (1, 1000)),  # all at once: nothing is cut
        (300, 200, (2, 150)),  # less than two tiles each
        (5000, 1046, (5, 1024)),
    ],
)
def test_tiles_are_whole_and_little_of_them_is_empty(size, most, expected):
    assert chunks.tiled(size, most) == expected


@pytest.mark.parametrize("size", [1047, 4097, 8192, 50_001])
@pytest.mark.parametrize("most", [256, 877, 1046])
def test_tiles_hold_all_within_the_limit(size, most):
    count, length = chunks.tiled(size, most)
    assert size <= count * length < 1.5 * size
    assert length <= most
    assert length % chunks.TILE == 0


@pytest.mark.parametrize(("platform", "expected"), [("tpu", (4, 1024, 1024)), ("gpu", (4, 1024, 1024))])
def test_accelerators_have_tiles_and_no_rows_of_their_own(platform, expected, monkeypatch):
    monkeypatch.setattr(chunks, "platform_in_use", lambda: platform)
    assert chunks.with_rows(4096, 128_256, None) == expected
