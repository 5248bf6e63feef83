"""The step's benchmark on a small model: rows, parts that add up, switches against the base."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.tiny_runs import SMALL

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_step

    monkeypatch.setattr(bench_step.Case, "model", SMALL)
    monkeypatch.setattr(bench_step, "ON_GPU", False)
    monkeypatch.setattr(bench_step, "DEVICE", torch.device("cpu"))
    yield bench_step
    sys.modules.pop("bench_step", None)


def arguments(build_until: float) -> argparse.Namespace:
    return argparse.Namespace(steps=1, rounds=2, build_until=build_until)


def test_rows_have_rates_gains_and_parts_that_add_up(bench: ModuleType) -> None:
    names = ("base", "target_copy", "residual: 16bit")
    cases = {n: bench.Case("cmae", "ti", "bf16", 4, **bench.LEVERS[n]) for n in names}
    rows = bench.measure_group(cases, arguments(time.perf_counter() + 600), {"bf16": 0.1})
    assert [row["name"] for row in rows] == list(names)
    for row in rows:
        assert row["images_per_s"]["n"] == 2
        parts = dict(row["parts_ms"])
        step = parts.pop("step")
        assert sum(parts.values()) == pytest.approx(step, rel=1e-6)
        assert parts.keys() == {
            *("target", "encoder", "pixel decoder", "feature decoder", "heads and losses"),
            *("backward", "optimiser", "EMA", "other"),
        }
        assert all(ms > 0 for ms in parts.values())
        assert row["mfu_measured"] == pytest.approx(row["tflops"] / 0.1)
    assert rows[0]["gain"]["median"] == 1.0


def test_what_cannot_run_or_comes_too_late_says_so(bench: ModuleType) -> None:
    cases = {
        "base": bench.Case("cmae", "ti", "bf16", 4),
        "sdpa: cudnn": bench.Case("cmae", "ti", "bf16", 4, speed={"sdpa": "cudnn"}),
    }
    rows = bench.measure_group(cases, arguments(time.perf_counter() + 600), {"bf16": 0.1})
    assert "speed.sdpa is 'cudnn'" in rows[1]["error"]
    rows = bench.measure_group(cases, arguments(0.0), {"bf16": 0.1})
    assert rows[1]["error"] == "no time left"


def test_every_lever_is_told_as_soon_as_it_is_measured(bench: ModuleType) -> None:
    names = ("base", "sdpa: cudnn", "residual: 16bit")
    cases = {n: bench.Case("cmae", "ti", "bf16", 4, **bench.LEVERS[n]) for n in names}
    rows: list[dict[str, object]] = []
    seen: list[int] = []
    real = bench.build

    def build(case: object, *, steps: int) -> object:
        seen.append(len(rows))
        return real(case, steps=steps)

    bench.build = build
    bench.measure_levers(
        cases, arguments(time.perf_counter() + 600), {"bf16": 0.1}, note=rows.append
    )
    assert seen == [0, 1, 2]
    assert [row["name"] for row in rows] == list(names)
    assert rows[0]["gain"]["median"] == 1.0
    assert rows[1]["error"].startswith("speed.sdpa is 'cudnn'")
    assert rows[2]["build_s"] > 0
    late: list[dict[str, object]] = []
    bench.measure_levers(cases, arguments(0.0), {"bf16": 0.1}, note=late.append)
    assert {row["error"] for row in late} == {"no time left"}


def test_tables_show_levers_and_errors(bench: ModuleType) -> None:
    from lib import tables

    cases = {
        "base": bench.Case("cmae", "ti", "bf16", 4),
        "sdpa: cudnn": bench.Case("cmae", "ti", "bf16", 4, speed={"sdpa": "cudnn"}),
    }
    rows = bench.measure_group(cases, arguments(time.perf_counter() + 600), {"bf16": 0.1})
    for table in (tables.levers_table, tables.step_table):
        lines = table({"rows": rows})
        assert len({len(line) for line in lines}) == 1
        assert any("cudnn" in cell for cell in lines[2])
