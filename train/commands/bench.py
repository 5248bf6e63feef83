"""`cmae bench`: what a recipe's step costs on a GPU, from counts and two numbers of the GPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cmae.errors import CmaeError, require
from cmae.model import ModelConfig, count_multiply_adds
from cmae.model.analysis.operations import PARTS, Operation, Precision, operations
from cmae.model.analysis.roofline import count_memory, ema_bytes, optimizer_bytes
from cmae.printable import printable
from cmae.train.batch_split import RESERVE, step_precision
from cmae.train.config import Config
from cmae.train.machine import compute_capability
from cmae.train.monitor.console import PlainConsole

GB = 1e9


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


def bench_model(
    config: Config, gpu: str, *, batch_size: int | None, results: Path, as_json: bool
) -> int:
    """Print the estimate for a recipe, beside what was measured.

    Args:
        config: Configuration of a run.
        gpu: Key of `GPUS`, or 'measured' for this device.
        batch_size: Images in one pass on one GPU; None: speed.micro_batch_size, or 128.
        results: Folder of result files.
        as_json: Whether to print JSON instead of a table.

    Raises:
        CmaeError: The GPU is not known, the batch is empty, or a result file is broken.
    """
    gpu = gpu.lower()
    if gpu != "measured" and gpu not in GPUS:
        raise CmaeError(f"--gpu is {gpu!r}; it must be 'measured' or one of {', '.join(GPUS)}")
    require(batch_size is None or batch_size >= 1, "--batch_size", batch_size, ">= 1")
    chosen_size = config.speed.micro_batch_size
    size = batch_size or (chosen_size if isinstance(chosen_size, int) else 128)
    chosen = measure_device(config.optim.precision) if gpu == "measured" else GPUS[gpu]
    estimate = estimate_step(config, chosen, batch_size=size)
    measured = find_measured(results, config.model, chosen.name, size)
    if as_json:
        plain = {**asdict(estimate), "step_ms": estimate.step_ms, "measured": measured}
        plain["gflop_run_per_image"] = estimate.gflop_run_per_image
        print(json.dumps(plain, indent=1))
    else:
        _print_tables(estimate, measured, config)
    return 0


def estimate_step(config: Config, gpu: Gpu, *, batch_size: int) -> Estimate:
    """Operations, traffic, time and memory of one pass of `batch_size` images and one optimiser step."""
    model = config.model
    precision = step_precision(config, gpu.capability)
    num_keys = max(config.optim.global_batch_size, batch_size)
    parts = _part_costs(model, precision, gpu, batch_size=batch_size, num_keys=num_keys)
    moved = {"optimiser": optimizer_bytes(model)}
    if model.has_contrast:
        moved["EMA"] = ema_bytes(model, precision)
    for name, count in moved.items():
        parts.append(PartCost(name, 0.0, count / GB, count / gpu.gb_per_s / 1e6, "memory"))
    memory = count_memory(model, precision, num_keys=num_keys)
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
                f"{path} is no result of benchmarks/bench_step.py ({type(error).__name__}: "
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


def is_named(gpu: str, device: str) -> bool:
    """Whether a device's name is that of this GPU; cards of another form have other rates."""
    words = device.lower().replace("-", " ").split()
    return gpu in words and not {"pcie", "nvl", "laptop", "d"} & set(words)


def _print_tables(estimate: Estimate, measured: Sequence[dict[str, Any]], config: Config) -> None:
    console, gpu = PlainConsole(highlight=True), estimate.gpu
    table = Table(
        title=f"one step of {estimate.batch_size} images on {gpu.name}: {gpu.tflops:.4g} TFLOP/s, "
        f"{gpu.gb_per_s:.4g} GB/s",
        title_justify="left",
    )
    for column in ("part", "GFLOP", "GB moved", "ms", "share", "bound by"):
        table.add_column(column, justify="left" if column in ("part", "bound by") else "right")
    total = estimate.step_ms
    for part in estimate.parts:
        cells = (f"{part.gflops:.1f}", f"{part.gbytes:.2f}", f"{part.ms:.3f}")
        table.add_row(part.part, *cells, f"{part.ms / total:.0%}", part.bound)
    gflops, gbytes = (
        sum(getattr(p, name) for p in estimate.parts) for name in ("gflops", "gbytes")
    )
    table.add_section()
    table.add_row("all", f"{gflops:.1f}", f"{gbytes:.2f}", f"{total:.3f}", "100%", "")
    console.print(table)
    facts = [
        f"ceiling            {estimate.ceiling_images_per_s:.0f} images/s: "
        f"{estimate.gflop_per_image:.1f} GFLOP an image as published, nothing else",
        f"run                {estimate.gflop_run_per_image:.1f} GFLOP an image: what nothing reads is not "
        "computed",
        f"roofline           {estimate.images_per_s:.0f} images/s, {estimate.utilisation:.0%} of the ceiling",
        f"memory             {estimate.memory_gb:.1f} GB: {estimate.memory_fixed_gb:.1f} fixed, "
        f"{1e3 * estimate.memory_per_image_gb:.1f} MB an image",
        f"largest batch      {estimate.largest_batch} images in {gpu.memory_gb:.0f} GB",
    ]
    for row in measured:
        rate = row["images_per_s"]["median"]
        how = " ".join(str(row[key]) for key in ("precision", "compile") if key in row)
        facts.append(
            f"measured           {rate:.0f} images/s, {rate / estimate.ceiling_images_per_s:.0%} of the "
            f"ceiling ({how}; {row['file']})"
        )
    if not measured:
        facts.append("measured           no result file has this model, GPU and batch size")
    console.print("\n".join(facts), highlight=False, soft_wrap=True)
