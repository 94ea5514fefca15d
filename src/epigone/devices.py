"""Devices: the platform that what is traced now will run on, and what each kind of device can do."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """What one device can do, as its maker says.

    Attributes:
        name: what it is called in topologies, such as v5e.
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes/s of the memory.
        link: bytes/s that it sends: to one neighbour of a torus in one direction, or to all devices of its node.
        dimensions: of the torus that connects the chips of a slice; 0 for none.
        node: devices that `link` connects, where there is no torus.
        network: bytes/s that it sends to devices elsewhere.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    dimensions: int = 0
    node: int = 8
    network: float = 50e9


GIB, GB = 2.0**30, 1e9

CHIPS = {
    # TPUs, one device a chip: docs.cloud.google.com/tpu/docs, a page a version. Links: "bidirectional ICI bandwidth per
    # chip" / 2 / ports. v4's peak, memory and links: Jouppi et al. 2023, table 4.
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 50e9, dimensions=3),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, dimensions=2),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, dimensions=3),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1638e9, 100e9, dimensions=2),
    # NVIDIA's data sheets of the A100, H100, H200 and of the DGX B200; FLOP/s that they give with sparsity, halved, and
    # NVLink of both directions, halved. Networks: one 200 Gb/s adapter a GPU in a DGX A100, 400 Gb/s in the others.
    "NVIDIA A100-SXM4-40GB": Chip("a100-40g", 312e12, 40 * GB, 1555e9, 300e9, network=25e9),
    "NVIDIA A100-SXM4-80GB": Chip("a100", 312e12, 80 * GB, 2039e9, 300e9, network=25e9),
    "NVIDIA A100-PCIE-40GB": Chip("a100-pcie-40g", 312e12, 40 * GB, 1555e9, 32e9, network=25e9),
    "NVIDIA A100 80GB PCIe": Chip("a100-pcie", 312e12, 80 * GB, 1935e9, 32e9, network=25e9),
    "NVIDIA H100 80GB HBM3": Chip("h100", 989.4e12, 80 * GB, 3350e9, 450e9),
    "NVIDIA H100 PCIe": Chip("h100-pcie", 756e12, 80 * GB, 2000e9, 64e9),
    "NVIDIA H100 NVL": Chip("h100-nvl", 835e12, 94 * GB, 3900e9, 64e9),
    "NVIDIA H200": Chip("h200", 989.4e12, 141 * GB, 4800e9, 450e9),
    "NVIDIA H200 NVL": Chip("h200-nvl", 835e12, 141 * GB, 4800e9, 64e9),
    "NVIDIA B200": Chip("b200", 2250e12, 180 * GB, 8000e9, 900e9),
}
"""By what JAX calls a device (`jax.Device.device_kind`). Others are not guessed."""


def platform_in_use() -> str:
    """Where what is traced now will run: the platform of the mesh that is set, or else of the process's devices.

    `cpu`, `gpu` (or `cuda`), or `tpu`. A mesh of devices that are not here, or of none at all, has one too.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()
