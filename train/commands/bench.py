"""`cmae bench`: what a recipe's step costs on a GPU, from counts; what parts of the system reach here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from cmae.errors import CmaeError, require
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.bench.compare import compare_files, read_result
from cmae.train.bench.config import BenchConfig
from cmae.train.bench.estimate import Estimate, estimate_step, find_measured, measure_device
from cmae.train.bench.harness import Report, write_report
from cmae.train.bench.tables import render
from cmae.train.config import Config
from cmae.train.gpus import GPUS
from cmae.train.monitor.console import PlainConsole


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


def run_benchmarks(names: Sequence[str], config: Config, bench: BenchConfig) -> int:
    """Measure, write a result file and a table of each, and compare where asked.

    Args:
        names: 'loader', 'step', 'kernels', 'e2e'.
        config: The recipe.
        bench: What to measure and how often.

    Returns:
        Exit code: 1 where something has become slower than in `bench.compare`.

    Raises:
        CmaeError: There are no shards, or the earlier file does not compare.
    """
    before = None if bench.compare is None else read_result(bench.compare)
    if before is not None and before["benchmark"] not in names:
        raise CmaeError(
            f"--compare {bench.compare} is a result of the benchmark {before['benchmark']!r}, and "
            f"{', '.join(names)} is measured: name a file of that, or run `cmae bench "
            f"{before['benchmark']}`",
            key="--compare",
        )
    exit_code = 0
    for name in names:
        report = _measure(name, config, bench)
        path = write_report(bench.out, report)
        result = read_result(path)
        table = render(result)
        with atomic_write(path.with_suffix(".md")) as file:
            file.write(table.encode())
        print(json.dumps(result, indent=1) if bench.json else table)
        print(f"wrote {path} and {path.with_suffix('.md').name}", file=sys.stderr)
        if before is not None and before["benchmark"] == report.benchmark:
            assert bench.compare is not None
            exit_code |= compare_files(
                bench.compare, path, threshold=bench.threshold, any_device=bench.any_device
            )
    return exit_code


def _measure(name: str, config: Config, bench: BenchConfig) -> Report:
    """One benchmark; what measures is imported here, for it is heavy."""
    if name == "loader":
        from cmae.train.bench.loader import bench_loader

        return bench_loader(config, bench)
    if name == "kernels":
        from cmae.train.bench.kernels import bench_kernels

        return bench_kernels(bench)
    from cmae.train.bench.step import bench_step, recipe_case

    if name == "step":
        return bench_step(config, bench)
    from cmae.train.bench.e2e import bench_e2e

    return bench_e2e(config, bench, recipe_case(config, bench))
