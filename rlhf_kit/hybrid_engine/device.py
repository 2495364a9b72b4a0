"""GPUs as the plan sees them: memory, and the rates that time is reckoned with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_kit.config import require


@dataclass(frozen=True)
class Device:
    """One GPU. Rates are the vendor's; what is reached of them is `REACHED`."""

    name: str
    memory: float
    """GiB that torch sees in all."""
    bandwidth: float
    """GB/s of its memory."""
    flops: float
    """TFLOP/s in bf16, dense."""
    link: float
    """GB/s to another GPU of its host, one way."""


DEVICES = {
    device.name: device
    for device in (
        Device("3090", 23.7, 936, 71, 25),
        Device("4090", 23.6, 1008, 165, 25),
        Device("a6000", 47.5, 768, 155, 25),
        Device("a100-40", 39.4, 1555, 312, 300),
        Device("a100", 79.1, 2039, 312, 300),
        Device("h100", 79.1, 3352, 989, 450),
        Device("h200", 139.8, 4800, 989, 450),
    )
}
"""By the name that `--gpu` takes."""

REACHED = {
    # Parts of a decode step put together reach 70 % of the floor at batch 64 and 83 % at 256, on
    # an H200; benchmarks/scaling_model.py assumes the same.
    "bandwidth": 0.7,
    # Plain PyTorch trains OPT-1.3B with a 350M critic at 504 of an H200's 989 TFLOP/s.
    "flops": 0.5,
    "link": 0.8,
}
DISK_RATE = 2e9
"""Bytes a second of a disk."""
HOST_RATE = 20e9
"""Bytes a second over PCIe 4 with 16 lanes, and to and from a host's memory in AdamW."""


def device(gpu: str | None = None, memory: float | None = None) -> Device:
    """The GPU to plan for: by name, by memory in GiB, or both; by neither, the one that is here.

    Of a GPU that is known by its memory alone the rates are those of the named one nearest to it.
    ValueError for a name that is not in DEVICES, and where there is none at all.
    """
    require(
        gpu is None or gpu in DEVICES,
        f"there is no GPU {gpu} in the table: choose one of {', '.join(DEVICES)}, or give its "
        "memory with --gpu-memory",
    )
    require(memory is None or memory > 0, "--gpu-memory must be positive, in GiB")
    if gpu is not None:
        found = DEVICES[gpu]
        return found if memory is None else replace(found, memory=memory)
    if memory is None:
        return _here()
    nearest = min(DEVICES.values(), key=lambda device: abs(device.memory - memory))
    return replace(nearest, name=f"a GPU as fast as {nearest.name}", memory=memory)


def _here() -> Device:
    import torch

    require(
        torch.cuda.is_available(),
        "no GPU is visible here; name the one to plan for: --gpu h100, or --gpu-memory 24",
    )
    found = torch.cuda.get_device_properties(0)
    memory = found.total_memory / 2**30
    plain = found.name.lower().replace(" ", "")
    named = [d for d in DEVICES.values() if d.name.split("-")[0] in plain]
    near = min(named or DEVICES.values(), key=lambda device: abs(device.memory - memory))
    return replace(near, name=found.name, memory=memory)
