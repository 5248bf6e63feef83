"""What limits a step on the GPUs that people have, from their vendor's data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """What limits a step."""

    name: str
    """A word of the device's name, as in result files."""
    tflops: float
    """Dense 16-bit matrix products with float32 sums."""
    gb_per_s: float
    """Device memory."""
    memory_gb: float
    """10^9 bytes."""
    capability: tuple[int, int] | None = (8, 0)
    """Compute capability; None = a CPU."""


# Dense 16-bit tensor-core rate, memory bandwidth and size, from NVIDIA's data sheets (A100 SXM 40 and
# 80 GB, H100 SXM, H200 SXM, HGX B200, L40S, V100 SXM2) and its Ada GPU architecture paper (RTX 4090).
# Where a sheet gives the rate with sparsity, it is halved.
GPUS = {
    "v100": Gpu("v100", 125, 900, 32, (7, 0)),
    "a100-40gb": Gpu("a100", 312, 1555, 40),
    "a100": Gpu("a100", 312, 2039, 80),
    "l40s": Gpu("l40s", 362, 864, 48, (8, 9)),
    "rtx4090": Gpu("4090", 165, 1008, 24, (8, 9)),
    "h100": Gpu("h100", 989, 3350, 80, (9, 0)),
    "h200": Gpu("h200", 989, 4800, 141, (9, 0)),
    "b200": Gpu("b200", 2250, 7700, 180, (10, 0)),
}


def is_named(gpu: str, device: str) -> bool:
    """Whether a device's name is that of this GPU; cards of another form have other rates."""
    words = device.lower().replace("-", " ").split()
    return gpu in words and not {"pcie", "nvl", "laptop", "d"} & set(words)


def vendor_tflops(device: torch.device) -> float | None:
    """The vendor's rate of dense 16-bit matrix products; None for a CPU and for cards that are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = [gpu.tflops for gpu in GPUS.values() if is_named(gpu.name, name)]
    return rates[0] if rates else None
