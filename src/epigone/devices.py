"""Devices: the platform that what is traced now will run on, and what each kind of device can do."""

import jax

PEAK_FLOPS = {
    # TPUs, one device a chip: cloud.google.com/tpu/docs, a page a version ("peak compute per chip, bf16").
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    # NVIDIA's data sheets of the A100, H100, H200 and of the DGX B200; those that they give with sparsity, halved.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of one device, by what JAX calls it (`jax.Device.device_kind`). Others are not guessed."""


def platform_in_use() -> str:
    """Where what is traced now will run: the platform of the mesh that is set, or else of the process's devices.

    `cpu`, `gpu` (or `cuda`), or `tpu`. A mesh of devices that are not here, or of none at all, has one too.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()
