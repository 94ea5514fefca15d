"""Names of devices that are not here, and how fast they exchange."""

import pytest

from epigone.devices import CHIPS
from epigone.errors import UserError
from epigone.planning.topologies import topology


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e:16x16", (16, 16)),
        ("v5e-256", (16, 16)),
        ("v5p-256", (4, 4, 8)),  # cores: two a chip
        ("v6e-64", (8, 8)),
        ("V5P:2x2x1", (2, 2, 1)),
        ("h100:64", (64,)),
        ("a100-40g-8", (8,)),
    ],
)
def test_names(name, shape):
    assert topology(name).shape == shape


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5x:4x4", "did you mean v5"),
        ("v5e", "as in v5e:16x16"),
        ("v5e-100", "take one of v5e-1, v5e-4"),
        ("v5p:4x4", "a v5p has 3 dimensions"),
        ("v5e:0x4", "has 2 dimensions"),
        ("h100:0", "as in h100:64"),
        ("h100:8x8", "as in h100:64"),
    ],
)
def test_what_is_none_is_told_in_one_line(name, said):
    with pytest.raises(UserError, match=said) as told:
        topology(name)
    assert "\n" not in str(told.value)


def test_along_a_torus():
    """Both directions along whole rings, one along parts of them; as many dimensions as it takes."""
    v5p, link = topology("v5p-256"), CHIPS["TPU v5"].link
    assert v5p.bandwidth((1, 128, 1, 1), ("fsdp",)) == 6 * link
    assert v5p.bandwidth((1, 32, 4, 1), ("tensor",)) == 2 * link
    assert v5p.bandwidth((1, 32, 4, 1), ("fsdp",)) == 4 * link
    assert v5p.bandwidth((1, 64, 2, 1), ("tensor",)) == link
    v6e = topology("v6e-64")  # 8 chips along a dimension are no ring
    assert v6e.bandwidth((1, 64, 1, 1), ("fsdp",)) == 2 * CHIPS["TPU v6 lite"].link


def test_in_a_node_and_between_nodes():
    h100, chip = topology("h100:64"), CHIPS["NVIDIA H100 80GB HBM3"]
    assert h100.bandwidth((8, 1, 8, 1), ("tensor",)) == chip.link
    assert h100.bandwidth((8, 1, 8, 1), ("data",)) == chip.network
    assert h100.bandwidth((1, 64, 1, 1), ("fsdp",)) == 8 * chip.network
    assert h100.bandwidth((1, 16, 4, 1), ("fsdp",)) == 2 * chip.network
    assert h100.bandwidth((1, 8, 2, 4), ("expert",)) == chip.link
    assert h100.bandwidth((1, 4, 2, 8), ("expert",)) == 4 * chip.network, (
        "those of one part of the heads are neighbours"
    )
    assert h100.bandwidth((1, 4, 2, 8), ("tensor",)) == chip.link
