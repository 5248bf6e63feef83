"""What a recipe's step costs on a GPU, from counts and two numbers of the GPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmae.errors import CmaeError
from cmae.model import ModelConfig, count_multiply_adds
from cmae.model.analysis.operations import PARTS, Operation, Precision, operations
from cmae.model.analysis.roofline import Shards, count_memory, ema_bytes, optimizer_bytes
from cmae.printable import printable
from cmae.train.batch_split import RESERVE, step_precision
from cmae.train.config import Config
from cmae.train.gpus import Gpu, is_named
from cmae.train.machine import compute_capability

GB = 1e9


@dataclass(frozen=True)
class PartCost:
    """One part of the step, for all images of a micro-batch."""

    part: str
    gflops: float
    gbytes: float
    ms: float
    """Sum over its kernels of the longer of computing and moving."""
    bound: str
    """'compute' or 'memory': what most of that time is."""


@dataclass(frozen=True)
class Estimate:
    """The step of one GPU as the model sees it."""

    gpu: Gpu
    batch_size: int
    parts: list[PartCost]
    gflop_per_image: float
    """Operations of the method as published, forward and backward: the measure of utilisation."""
    ceiling_images_per_s: float
    """If nothing but the published multiply-adds took time."""
    images_per_s: float
    """By the sum of the parts."""
    memory_gb: float
    memory_fixed_gb: float
    memory_per_image_gb: float
    largest_batch: int

    @property
    def step_ms(self) -> float:
        """Sum of the parts."""
        return sum(part.ms for part in self.parts)

    @property
    def gflop_run_per_image(self) -> float:
        """Operations that this code runs, forward and backward; it leaves out what nothing reads."""
        return sum(part.gflops for part in self.parts) / self.batch_size

    @property
    def utilisation(self) -> float:
        """Published operations per second over the GPU's rate."""
        return self.images_per_s / self.ceiling_images_per_s


def estimate_step(
    config: Config, gpu: Gpu, *, batch_size: int, shards: Shards | None = None
) -> Estimate:
    """Operations, traffic, time and memory of one pass of `batch_size` images and one optimiser step.

    Args:
        config: Configuration of the run.
        gpu: GPU to count for.
        batch_size: Images of the pass.
        shards: Ranks that share out what each would hold; None: each has all of it.
    """
    shards = shards or Shards()
    model = config.model
    precision = step_precision(config, gpu.capability)
    num_keys = max(config.optim.global_batch_size, batch_size)
    parts = _part_costs(model, precision, gpu, batch_size=batch_size, num_keys=num_keys)
    moved = {"optimiser": optimizer_bytes(model) / shards.moments}
    if model.has_contrast:
        moved["EMA"] = ema_bytes(model, precision) / shards.weights
    for name, count in moved.items():
        parts.append(PartCost(name, 0.0, count / GB, count / gpu.gb_per_s / 1e6, "memory"))
    memory = count_memory(model, precision, num_keys=num_keys, shards=shards)
    gflop = 2 * count_multiply_adds(model)["training_step"] / 1e9
    return Estimate(
        gpu=gpu,
        batch_size=batch_size,
        parts=parts,
        gflop_per_image=gflop,
        ceiling_images_per_s=1e3 * gpu.tflops / gflop,
        images_per_s=1e3 * batch_size / sum(part.ms for part in parts),
        memory_gb=memory.total(batch_size) / GB,
        memory_fixed_gb=memory.fixed / GB,
        memory_per_image_gb=memory.activations_per_image / GB,
        largest_batch=memory.largest_batch(gpu.memory_gb * GB * (1 - RESERVE)),
    )


@dataclass
class _Tally:
    """Sums over the kernels of a part."""

    flops: float = 0.0
    bytes: float = 0.0
    computing_ms: float = 0.0
    """Time of the kernels that compute longer than they move."""
    moving_ms: float = 0.0
    """Time of the others."""

    def add(self, flops: float, moved: float, gpu: Gpu) -> None:
        """Count one kernel, which takes the longer of computing and moving."""
        computing, moving = flops / (gpu.tflops * 1e9), moved / (gpu.gb_per_s * 1e6)
        self.flops += flops
        self.bytes += moved
        if computing >= moving:
            self.computing_ms += computing
        else:
            self.moving_ms += moving

    def cost(self, part: str) -> PartCost:
        """The sums under the name of the part."""
        bound = "compute" if self.computing_ms >= self.moving_ms else "memory"
        ms = self.computing_ms + self.moving_ms
        return PartCost(part, self.flops / 1e9, self.bytes / GB, ms, bound)


def _part_costs(
    model: ModelConfig, precision: Precision, gpu: Gpu, *, batch_size: int, num_keys: int
) -> list[PartCost]:
    """Cost of each part that the model has, forward and backward."""
    tallies = {part: _Tally() for part in PARTS}
    for op in operations(model, precision, num_keys=num_keys):
        for flops, moved in _passes(op, batch_size):
            tallies[op.part].add(flops, moved, gpu)
        tallies[op.part].add(0.0, op.cast_bytes, gpu)
    return [tally.cost(part) for part, tally in tallies.items() if tally.bytes]


def _passes(op: Operation, batch_size: int) -> list[tuple[float, float]]:
    """Operations and bytes of the forward pass, and of the backward pass where there is one.

    A forward pass moves about a third of what the weights move in a step.
    """
    share = 1.0 if op.part == "target" else 1 / 3
    forward = batch_size * op.flops, batch_size * op.bytes + share * op.step_bytes
    if op.part == "target":
        return [forward]
    moved = batch_size * op.backward_bytes + (1 - share) * op.step_bytes
    return [forward, (batch_size * op.backward_flops, moved)]


def measure_device(precision: str) -> Gpu:
    """Rate of a large matrix product and of a large copy on this device, and its memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = names[precision] if device.type == "cuda" else torch.float32
    tflops = measure_matmul_tflops(device, dtype)
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest_s(lambda: target.copy_(source), device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name.lower(), properties.total_memory / GB
    else:
        import psutil

        name, memory = "cpu", psutil.virtual_memory().total / GB
    capability = compute_capability(device)
    return Gpu(name, tflops, 2 * size / seconds / GB, memory, capability)


def measure_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Highest rate of a square matrix product: what a perfect step could reach."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2e-12 * size**3 / fastest_s(lambda: left @ right, device)


def fastest_s(function: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Shortest of some runs, seconds, after two that warm up."""
    on_gpu = device.type == "cuda"
    best = math.inf
    for index in range(repeats + 2):
        started = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize(device)
        if index >= 2:
            best = min(best, time.perf_counter() - started)
    return best


def find_measured(
    results: Path, model: ModelConfig, gpu: str, batch_size: int
) -> list[dict[str, Any]]:
    """Rows of step results for this model, GPU and batch size; the newest files first.

    A row belongs to the model if it counts the same multiply-adds an image.
    """
    gmacs = count_multiply_adds(model)["training_step"] / 1e9
    found: list[dict[str, Any]] = []
    files = [*results.glob("*_step_*.json"), *results.glob("*_levers_*.json")]
    for path in sorted(files, reverse=True):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            device = str(result["machine"]["device"]).lower()
            if not is_named(gpu, device):
                continue
            rows = [row for row in result["rows"] if _fits(row, gmacs, batch_size)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CmaeError(
                f"{path} is no result of `cmae bench step` ({type(error).__name__}: "
                f"{printable(str(error))}): correct it, remove it, or name another folder with --results",
                key="--results",
            ) from error
        found += [{**row, "device": device, "file": path.name} for row in rows]
    return found


def _fits(row: dict[str, Any], gmacs: float, batch_size: int) -> bool:
    """Whether a row is a measured step of this model and batch.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is no row.
    """
    if row.get("batch_size") != batch_size or "images_per_s" not in row:
        return False
    float(row["images_per_s"]["median"])
    return math.isclose(row.get("gmacs_per_image", 0), gmacs)
