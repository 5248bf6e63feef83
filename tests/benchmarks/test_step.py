"""The step's benchmark on a small model: rows, parts that add up, switches against the base."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny_runs import SMALL

from cmae.model import ModelConfig
from cmae.pipeline import LoaderConfig, ViewConfig
from cmae.train.bench import step as bench
from cmae.train.bench import tables
from cmae.train.bench.config import BenchConfig
from cmae.train.bench.step import LEVERS, Case, Plan
from cmae.train.config import Config, OptimConfig, SpeedConfig

BASE = Case(
    "tiny", SMALL, OptimConfig(global_batch_size=4, precision="bf16"), SpeedConfig(**bench.PLAIN)
)
CUDNN = BASE.switched(speed={"sdpa": "cudnn"})
CEILING = {"bf16": 0.1}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench, "ON_GPU", False)
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))


def plan(build_until: float = float("inf")) -> Plan:
    return Plan(steps=1, rounds=2, build_until=build_until)


def soon() -> Plan:
    return plan(time.perf_counter() + 600)


def test_rows_have_rates_gains_and_parts_that_add_up() -> None:
    names = ("base", "target_copy", "residual: 16bit")
    cases = {n: BASE.switched(**LEVERS[n]) for n in names}
    rows = bench.measure_group(cases, soon(), CEILING)
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


def test_what_cannot_run_or_comes_too_late_says_so() -> None:
    cases = {
        "base": BASE,
        "sdpa: cudnn": CUDNN,
    }
    rows = bench.measure_group(cases, soon(), CEILING)
    assert "speed.sdpa is 'cudnn'" in rows[1]["error"]
    rows = bench.measure_group(cases, plan(0.0), CEILING)
    assert rows[1]["error"] == "no time left"


def test_every_lever_is_told_as_soon_as_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("base", "sdpa: cudnn", "residual: 16bit")
    cases = {n: BASE.switched(**LEVERS[n]) for n in names}
    rows: list[dict[str, Any]] = []
    seen: list[int] = []
    real = bench.build

    def build(case: Case, *, steps: int) -> object:
        seen.append(len(rows))
        return real(case, steps=steps)

    monkeypatch.setattr(bench, "build", build)
    bench.measure_levers(cases, soon(), CEILING, note=rows.append)
    assert seen == [0, 1, 2]
    assert [row["name"] for row in rows] == list(names)
    assert rows[0]["gain"]["median"] == 1.0
    assert rows[1]["error"].startswith("speed.sdpa is 'cudnn'")
    assert rows[2]["build_s"] > 0
    late: list[dict[str, Any]] = []
    bench.measure_levers(cases, plan(0.0), CEILING, note=late.append)
    assert {row["error"] for row in late} == {"no time left"}


def test_tables_show_levers_and_errors() -> None:
    cases = {
        "base": BASE,
        "sdpa: cudnn": CUDNN,
    }
    rows = bench.measure_group(cases, soon(), CEILING)
    for table in (tables.levers_table, tables.step_table):
        lines = table({"rows": rows})
        assert len({len(line) for line in lines}) == 1
        assert any("cudnn" in cell for cell in lines[2])


def test_a_recipe_is_measured_beside_mae_as_its_public_code_does_it() -> None:
    views = ViewConfig(img_size=SMALL.img_size, source_crop_size=40, target_shift=8)
    data = LoaderConfig(views=views)
    config = Config(data=data, model=SMALL, optim=OptimConfig(global_batch_size=256))
    chosen = BenchConfig(batch_size=4, rounds=2, steps=1)
    report = bench.bench_step(config, chosen)
    assert [row["name"] for row in report.rows] == ["none", "ours, MAE", "public MAE code's step"]
    assert all(row["images_per_s"]["median"] > 0 for row in report.rows)
    assert all(row["precision"] == "fp32" for row in report.rows)  # a CPU has no fp16
    assert report.rows[1]["gmacs_per_image"] == report.rows[2]["gmacs_per_image"]
    levers = bench.bench_step(config, BenchConfig(batch_size=4, rounds=2, steps=1, levers=True))
    assert [row["name"] for row in levers.rows] == bench.levers_here()


def test_the_public_step_learns_and_has_the_parameters_of_ours() -> None:
    from cmae.model import build_model
    from cmae.train.bench.peers.mae_step import MaeStep

    model = ModelConfig(**{**vars(SMALL), "contrastive_loss": "none"})
    optim = OptimConfig(global_batch_size=8, precision="fp32")
    peer = MaeStep(model, optim, torch.device("cpu"))
    ours = {n: p for n, p in build_model(model, seed=0).named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in ours.values())
    images = torch.randint(0, 256, (8, model.img_size, model.img_size, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2).float() - peer.mean) / peer.std
    for group in peer.optimizer.param_groups:
        group["lr"] = 1e-2
    torch.manual_seed(1)
    before = peer.model(pixels).item()
    for _ in range(20):
        peer(images)
    assert peer.model(pixels).item() < before - 0.05
