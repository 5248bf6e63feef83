"""A profile as `cmae profile` would find it on a machine whose eight cores cannot decode fast enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cmae.train.profiling.analysis.records import (
    Action,
    Component,
    Curve,
    Diagnosis,
    Estimate,
    Operation,
    Phase,
    Profile,
)

BATCH = 256


def estimate(value: float, half: float, n: int = 7) -> Estimate:
    return Estimate(value, value - half, value + half, n)


def histogram(median_ms: float, spread: float, count: int, seed: int) -> dict[str, int]:
    """Counts of log-normal latencies in the loader's bins."""
    rng = np.random.default_rng(seed)
    micros = 1000 * median_ms * np.exp(spread * rng.normal(size=count))
    bins, counts = np.unique(np.floor(20 * np.log10(micros)).astype(int), return_counts=True)
    return {str(number): int(n) for number, n in zip(bins, counts, strict=True)}


def stage(
    name: str, *, threads: int, shares: tuple[float, float, float], median_ms: float, seed: int
) -> dict[str, Any]:
    seconds = {
        key: threads * 30.0 * share
        for key, share in zip(("busy_s", "starved_s", "blocked_s"), shares, strict=True)
    }
    return {
        "name": name,
        "threads": threads,
        "items": 28800,
        "bytes": 28800 * (112_000 if name == "read" else 301_056),
        "cpu_s": 0.9 * seconds["busy_s"],
        "histogram": histogram(median_ms, 0.5 if name == "decode_augment" else 0.3, 5000, seed),
        **seconds,
    }


def loader(time_s: float = 30.0) -> dict[str, Any]:
    stages = [
        stage("read", threads=4, shares=(0.06, 0.0, 0.94), median_ms=0.25, seed=1),
        stage("decode_augment", threads=8, shares=(0.97, 0.01, 0.02), median_ms=7.6, seed=2),
        stage("prefetch", threads=1, shares=(0.04, 0.95, 0.01), median_ms=9.5, seed=3),
        stage("queue", threads=1, shares=(0.0, 0.62, 0.0), median_ms=165.0, seed=4),
    ]
    return {
        "time_s": time_s,
        "stages": {one["name"]: one for one in stages},
        "batches": 112,
        "samples": 28672,
        "wait_s": 18.6,
        "queue_depth_mean": 0.06,
        "bad_samples": 0,
    }


def phase(name: str, what: str, ms: float, seed: int, *, with_loader: bool = False) -> Phase:
    rng = np.random.default_rng(seed)
    times = tuple((ms * (0.97 + rng.gamma(2.0, 0.015, 112))).round(3).tolist())
    rate = 1000 * BATCH / ms
    return Phase(
        name,
        what,
        estimate(ms, 0.015 * ms),
        estimate(rate, 0.015 * rate),
        loader() if with_loader else None,
        times,
    )


def decode_bound() -> Profile:
    return Profile(
        created="2026-11-24T15:20:00Z",
        machine={
            "device": "NVIDIA A100-SXM4-80GB",
            "cpu": "AMD EPYC 7763",
            "cores": 8,
            "git": "15ae463",
            "versions": {"torch": "2.14.1", "triton": "3.8.0"},
        },
        config={
            "speed": {"num_threads": 8, "prefetch": 2},
            "data": {"shards": "/data/train-*.tar"},
        },
        global_batch_size=BATCH,
        world_size=1,
        phases=(
            phase("synthetic", "the step on a batch that lies on the device", 101.0, 1),
            phase("replay", "the step on real batches that lie on the device", 101.6, 2),
            phase(
                "interference", "replay, while the loader runs unread", 104.5, 3, with_loader=True
            ),
            phase("memory", "decode from memory, no storage", 262.0, 4, with_loader=True),
            phase("warm", "files in the page cache", 266.0, 5, with_loader=True),
            phase("full", "everything, from shards not read before", 268.0, 6, with_loader=True),
        ),
        step_ms=estimate(268.0, 4.0),
        breakdown=(
            Component("model", estimate(101.0, 0.5), "synthetic step"),
            Component("host_to_device", estimate(0.6, 0.4), "replay less synthetic"),
            Component("decode_augment", estimate(157.5, 4.2), "memory less interference"),
            Component("prefetch", estimate(0.4, 0.3), "time of the training thread in next()"),
            Component("read_warm", estimate(4.0, 2.1), "warm less memory"),
            Component("read_cold", estimate(2.0, 3.0), "full less warm"),
            Component("interference", estimate(2.9, 0.8), "replay beside an unread loader"),
            Component("residual", estimate(-0.4, 5.5), "what the components do not explain"),
        ),
        diagnosis=Diagnosis(
            "Bound by JPEG decode on 8 cores: 8 more cores give 1.9x, speed.hw_decoder_load 0.6 gives "
            "2.4x, then the model is the bottleneck.",
            bottleneck="decode_augment",
            headroom=1.93,
        ),
        actions=(
            Action(
                "decode on the GPU's JPEG unit",
                {"speed.hw_decoder_load": 0.6},
                2292.0,
                "model",
                estimate(2205.0, 40.0),
            ),
            Action("decode on 8 more cores", {"speed.num_threads": 16}, 1815.0, "decode_augment"),
            Action("no colour operations", {"data.views.color": "none"}, 1420.0, "decode_augment"),
            Action("a faster disk", {}, 961.0, "decode_augment"),
        ),
        curves=(
            Curve(
                "Cores that decode",
                "threads",
                (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0),
                (240.0, 480.0, 955.0, 1410.0, 1815.0, 2450.0, 2450.0),
                now=8.0,
            ),
            Curve(
                "Share of the JPEG unit",
                "hw_decoder_load",
                (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
                (955.0, 1190.0, 1580.0, 2292.0, 1900.0, 1500.0),
                now=0.0,
            ),
        ),
        slow_images=(
            {
                "jpeg_kind": "baseline",
                "megapixels": 0.1,
                "megapixels_up_to": 0.25,
                "items": 24100,
                "ms": 6.9,
            },
            {
                "jpeg_kind": "baseline",
                "megapixels": 4.0,
                "megapixels_up_to": None,
                "items": 210,
                "ms": 61.0,
            },
            {
                "jpeg_kind": "progressive",
                "megapixels": 0.1,
                "megapixels_up_to": 0.25,
                "items": 812,
                "ms": 13.2,
            },
        ),
        operations=(
            Operation("decode", estimate(5.1, 0.2), estimate(0.64, 0.03), 1560.0),
            Operation("resize, flip", estimate(1.2, 0.1), estimate(0.15, 0.02), 1265.0),
            Operation("crop", estimate(0.08, 0.05), estimate(0.01, 0.01), 1250.0),
            Operation("colour jitter", estimate(0.9, 0.1), estimate(0.12, 0.02), 1087.0),
        ),
        gpu={
            "mean": {
                "sm_pct": 38.0,
                "memory_pct": 22.0,
                "decoder_pct": 0.0,
                "pcie_rx_mb_per_s": 310.0,
            },
            "max": {
                "sm_pct": 99.0,
                "memory_pct": 61.0,
                "decoder_pct": 0.0,
                "pcie_rx_mb_per_s": 2950.0,
            },
        },
        notes=(
            "No network between ranks: one rank only, so collective and straggler are not measured.",
        ),
    )


def faster() -> Profile:
    """The same machine after 16 threads decode: half the decode time, the rest within its noise."""
    before = decode_bound()
    breakdown = tuple(
        replace(one, ms=estimate(35.0, 3.0)) if one.name == "decode_augment" else one
        for one in before.breakdown
    )
    return replace(
        before,
        created="2026-11-24T16:20:00Z",
        config={**before.config, "speed": {"num_threads": 16, "prefetch": 2}},
        step_ms=estimate(145.5, 3.0),
        breakdown=breakdown,
        diagnosis=Diagnosis("Bound by the model; the loader has 1.1x head-room.", "model", 1.1),
    )
