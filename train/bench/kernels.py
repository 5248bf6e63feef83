"""How close to the hardware's limit are the kernels, and what do they save against plain and compiled torch?

Every op, forward and backward, by three contenders: the torch reference, the same under torch.compile, and
the Triton kernel. The floor is the larger of bytes / measured copy bandwidth and multiply-adds / measured
matmul rate, counted once for what must be read and written. Between runs a 256 MB buffer is written, so that
the cache is cold. On a CPU small shapes run through the references alone, to test this script.

Predictions, written before the first run, for an H100 (2.6 TB/s copies, 600 TFLOP/s), B=128, authors' mask:
patch_gather to fp16, 20 MB: floor 8 us, kernel 60 % of it, eager 8x the kernel. masked_mse of 128 patches in
fp16, 38 MB forward and 63 MB backward: floors 15 and 24 us, kernel 60 %, eager 6x, compiled 2x. info_nce,
128 queries, 4096 keys of 256: floor 2 us, kernel 20 us in four launches (launches decide), eager 60 us in 15;
with 32768 keys 14 us floor, kernel 45 us. block_mask: no floor worth the name, 5 us against 300 us in some
200 launches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cmae.kernels.backend import Backend
from cmae.kernels.block_mask import block_mask
from cmae.kernels.info_nce import info_nce
from cmae.kernels.masked_mse import masked_mse
from cmae.kernels.patch_gather import patch_gather
from cmae.train.bench.config import BenchConfig
from cmae.train.bench.harness import Report, summarise

CONSTANTS = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
MASKS = {"authors": (2, 17), "75 %": (1, 49)}  # mask_unit, units kept of a 14 x 14 grid


@dataclass(frozen=True)
class Case:
    """One op on one shape."""

    op: str
    shape: str
    run: Callable[[Backend], Tensor]
    """Calls the op on a backend; the result is the loss where there is a backward."""
    learnt: Tensor | None
    bytes_forward: int
    bytes_backward: int
    multiply_adds: int
    """Forward and backward together."""


@dataclass(frozen=True)
class Limits:
    """What the device reaches on the plainest work there is."""

    bytes_per_s: float
    multiply_adds_per_s: float

    def floor_us(self, num_bytes: int, multiply_adds: int) -> float:
        """The shortest time in which the work could be done."""
        return 1e6 * max(num_bytes / self.bytes_per_s, multiply_adds / self.multiply_adds_per_s)


def build_cases(
    batch_sizes: list[int], num_keys: list[int], *, device: torch.device, dtype: torch.dtype
) -> list[Case]:
    """All ops at the shapes of ViT-B/16 on 224 px."""
    cases = []
    for batch in batch_sizes:
        images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
        for name, (mask_unit, num_keep_units) in MASKS.items():
            shape = f"B={batch}, {name}"
            cases += _mask_cases(images, shape, mask_unit, num_keep_units, dtype)
        cases += [_info_nce_case(batch, count, device, dtype) for count in num_keys]
    return cases


def _mask_cases(
    images: Tensor, shape: str, mask_unit: int, num_keep_units: int, dtype: torch.dtype
) -> list[Case]:
    batch = len(images)
    samples = torch.arange(batch, device=images.device)
    mask: dict[str, Any] = {
        "grid": (14, 14),
        "mask_unit": mask_unit,
        "num_keep_units": num_keep_units,
        "seed": 0,
        "epoch": 0,
    }
    ids_keep, ids_mask = block_mask(samples, **mask)
    pred = torch.randn(batch, ids_mask.shape[1], 768, device=images.device, dtype=dtype)
    pred.requires_grad_()
    patches: dict[str, Any] = {"patch_size": 16, **CONSTANTS}
    size = pred.element_size()
    return [
        Case(
            "patch_gather",
            shape,
            lambda backend: patch_gather(
                images, ids_keep, out_dtype=dtype, backend=backend, **patches
            ),
            None,
            ids_keep.numel() * 768 * (1 + size),
            0,
            0,
        ),
        Case(
            "masked_mse",
            shape,
            lambda backend: masked_mse(pred, images, ids_mask, backend=backend, **patches),
            pred,
            pred.numel() * (1 + size),
            pred.numel() * (1 + 2 * size),
            0,
        ),
        Case(
            "block_mask",
            shape,
            lambda backend: block_mask(samples, backend=backend, **mask)[0],
            None,
            4 * (ids_keep.numel() + ids_mask.numel()),
            0,
            0,
        ),
    ]


def _info_nce_case(batch: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> Case:
    query = torch.randn(batch, 256, device=device, dtype=dtype).requires_grad_()
    keys = torch.randn(max(num_keys, batch), 256, device=device)
    return Case(
        "info_nce",
        f"B={batch}, {len(keys)} keys",
        lambda backend: info_nce(query, keys, temperature=0.07, backend=backend),
        query,
        keys.numel() * 4,  # the gradient of the query falls out of the same pass
        query.numel() * 2 * query.element_size(),
        2 * batch * len(keys) * 256,
    )


def measure_limits(device: torch.device) -> Limits:
    """Copy bandwidth (read and write) and matmul rate of the device."""
    on_gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if on_gpu else (1 << 25), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 512
    a = torch.randn(side, side, device=device, dtype=torch.float16 if on_gpu else torch.float32)
    copy_us = min(time_us(lambda: target.copy_(source), device) for _ in range(5))
    product_us = min(time_us(lambda: a @ a, device) for _ in range(5))
    return Limits(2e6 * source.numel() / copy_us, 1e6 * side**3 / product_us)


def time_us(run: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one call on the device."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Work that keeps the GPU busy while the host launches: else the host's speed would be measured.
    torch.cuda._sleep(20_000_000)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def contenders(case: Case, *, with_triton: bool) -> dict[str, Callable[[], Tensor]]:
    """Ways to run a case; all but the kernel are the reference."""

    def reference() -> Tensor:
        return case.run("torch")

    torch.compiler.reset()
    found = {"eager": reference, "compile": torch.compile(reference, fullgraph=True, dynamic=False)}
    if with_triton:
        found["triton"] = lambda: case.run("triton")
    return found


def measure_case(
    case: Case, *, limits: Limits, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Interleaved rounds of every contender, forward and backward, with a cold cache."""
    flush = torch.empty(
        (256 if device.type == "cuda" else 1) << 20, dtype=torch.uint8, device=device
    )
    runs = contenders(case, with_triton=device.type == "cuda")
    times: dict[str, dict[str, list[float]]] = {name: {"fwd": [], "bwd": []} for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            flush.fill_(index % 7)
            outputs: list[Tensor] = []
            forward_us = time_us(partial(_append, outputs, run), device)
            backward_us = None
            if case.learnt is not None:
                flush.fill_(index % 5)
                backward_us = time_us(partial(_backward, case, outputs[0]), device)
            if index >= 2:  # the first rounds compile and warm up
                times[name]["fwd"].append(forward_us)
                times[name]["bwd"] += [] if backward_us is None else [backward_us]
    rows = []
    for name, run in runs.items():
        extra = (
            {"launches": None, "peak_mib": None} if device.type == "cpu" else _resources(case, run)
        )
        forward_floor = limits.floor_us(
            case.bytes_forward, case.multiply_adds if case.op == "info_nce" else 0
        )
        row = {"op": case.op, "shape": case.shape, "contender": name, **extra}
        row["forward_us"] = summarise(times[name]["fwd"])
        row["forward_floor_us"] = forward_floor
        if case.learnt is not None:
            row["backward_us"] = summarise(times[name]["bwd"])
            row["backward_floor_us"] = limits.floor_us(case.bytes_backward, 0)
        rows.append(row)
        share = 100 * forward_floor / row["forward_us"]["median"]
        print(
            f"{case.op:<13} {case.shape:<22} {name:<8} {row['forward_us']['median']:9.1f} us  "
            f"{share:5.1f} % of floor",
            file=sys.stderr,
        )
    return rows


def _append(outputs: list[Tensor], run: Callable[[], Tensor]) -> None:
    outputs.append(run())


def _backward(case: Case, loss: Tensor) -> tuple[Tensor, ...]:
    assert case.learnt is not None
    return torch.autograd.grad(loss, case.learnt)


def _resources(case: Case, run: Callable[[], Tensor]) -> dict[str, Any]:
    """Kernels launched and memory taken by one forward and backward."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        out = run()
        if case.learnt is not None:
            _backward(case, out)
        torch.cuda.synchronize()
    kernels = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"launches": len(kernels), "peak_mib": round(peak, 2)}


def bench_kernels(bench: BenchConfig) -> Report:
    """Every op, forward and backward, by three contenders; on a CPU small shapes by the references alone.

    Args:
        bench: How many rounds, and the batch size (else 128 and 512 on a GPU).
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        print(
            "no GPU: small shapes, torch references alone; this shows the table, not the kernels",
            file=sys.stderr,
        )
    batch_sizes = [bench.batch_size] if bench.batch_size else ([128, 512] if on_gpu else [2])
    keys = [4096, 32768] if on_gpu else [64]
    rounds = bench.rounds or (30 if on_gpu else 3)
    dtype = torch.float16 if on_gpu else torch.float32
    limits = measure_limits(device)
    rows: list[dict[str, Any]] = []
    for case in build_cases(batch_sizes, keys, device=device, dtype=dtype):
        rows += measure_case(case, limits=limits, rounds=rounds, device=device)
    config = {
        "batch_sizes": batch_sizes,
        "keys": keys,
        "rounds": rounds,
        "dtype": str(dtype),
        "copy_gb_per_s": limits.bytes_per_s / 1e9,
        "matmul_tflops": 2 * limits.multiply_adds_per_s / 1e12,
    }
    return Report("kernels", "", config, rows)
