"""The cost model of a recipe: published ceilings, rooflines worked out by hand, what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmae.model import ModelConfig, count_multiply_adds
from cmae.train.bench.estimate import estimate_step, find_measured, measure_device
from cmae.train.commands.main import main
from cmae.train.config import Config, OptimConfig, SpeedConfig
from cmae.train.gpus import GPUS, Gpu

VIT_B = Config()


@pytest.mark.parametrize(
    ("gpu", "images_per_s"), [(GPUS["a100"], 2778), (Gpu("h200", 790, 4800, 141), 7035)]
)
def test_the_ceiling_is_the_rate_over_the_published_operations(
    gpu: Gpu, images_per_s: float
) -> None:
    estimate = estimate_step(VIT_B, gpu, batch_size=128)
    assert estimate.gflop_per_image == pytest.approx(112.95, abs=0.01)
    assert estimate.ceiling_images_per_s == pytest.approx(images_per_s, rel=0.01)
    assert 0.3 < estimate.utilisation < 1


def test_shares_of_the_parts_are_the_published_ones() -> None:
    # Without a limit on memory traffic only operations take time: 32, 31, 28 and 7 %.
    estimate = estimate_step(VIT_B, Gpu("ideal", 312, 1e9, 80), batch_size=128)
    share = {part.part: part.ms / estimate.step_ms for part in estimate.parts}
    expected = {"encoder": 0.32, "target": 0.31, "pixel decoder": 0.28, "feature decoder": 0.07}
    for name, value in expected.items():
        assert share[name] == pytest.approx(value, abs=0.015), name
    flops = sum(part.gflops for part in estimate.parts if part.part != "losses") / 128
    exact = 2e-9 * count_multiply_adds(ModelConfig(), as_published=False)["training_step"]
    assert flops == pytest.approx(exact, rel=1e-9)
    in_table = sum(part.gflops for part in estimate.parts) / 128
    assert estimate.gflop_run_per_image == pytest.approx(in_table)
    assert all(part.bound == "compute" for part in estimate.parts[:4])


def test_the_optimiser_is_bound_by_memory_and_takes_bytes_over_bandwidth() -> None:
    estimate = estimate_step(VIT_B, GPUS["h200"], batch_size=128)
    by_name = {part.part: part for part in estimate.parts}
    assert by_name["optimiser"].ms == pytest.approx(1e3 * 36 * 121_269_504 / 4.8e12)
    assert by_name["EMA"].ms == pytest.approx(1e3 * 12 * 87_374_592 / 4.8e12)
    assert by_name["optimiser"].bound == "memory"


def test_the_largest_batch_fills_the_memory() -> None:
    estimate = estimate_step(VIT_B, GPUS["a100"], batch_size=128)
    snapshot = 4 * (3 * 121_269_504 + 87_374_592) / 1e9  # a checkpoint's copy stands beside it
    usable = 0.92 * 80 - snapshot
    at_largest = estimate.memory_fixed_gb + estimate.largest_batch * estimate.memory_per_image_gb
    assert usable - estimate.memory_per_image_gb < at_largest <= usable
    huge = Config(model=ModelConfig(embed_dim=1280, depth=32, num_heads=16, patch_size=14))
    assert estimate_step(huge, Gpu("tiny", 100, 500, 8), batch_size=1).largest_batch == 0


def test_switches_lower_the_roofline_of_the_step() -> None:
    def step_ms(speed: SpeedConfig, optim: OptimConfig) -> float:
        config = Config(speed=speed, optim=optim)
        return estimate_step(config, GPUS["h200"], batch_size=128).step_ms

    base = step_ms(SpeedConfig(), OptimConfig())
    assert step_ms(SpeedConfig(compile="blocks"), OptimConfig()) < 0.97 * base
    assert step_ms(SpeedConfig(), OptimConfig(residual="16bit")) < 0.9 * base
    # With one micro-batch the copy's refresh moves what the casts moved: only launches are saved.
    target_copy = step_ms(SpeedConfig(target_copy=True), OptimConfig())
    assert target_copy == pytest.approx(base, rel=1e-3)


def result_file(folder: Path, *, device: str, batch_size: int, gmacs: float) -> None:
    row = {
        "batch_size": batch_size,
        "gmacs_per_image": gmacs,
        "images_per_s": {"median": 4000.0},
        "precision": "fp16",
        "compile": "blocks",
    }
    content = {"machine": {"device": device}, "rows": [row]}
    folder.mkdir(exist_ok=True)
    (folder / f"2026-01-01_step_{batch_size}_{gmacs:.0f}.json").write_text(json.dumps(content))


def test_measurements_of_the_same_model_gpu_and_batch_are_found(tmp_path: Path) -> None:
    gmacs = count_multiply_adds(ModelConfig())["training_step"] / 1e9
    result_file(tmp_path, device="NVIDIA H200", batch_size=128, gmacs=gmacs)
    result_file(tmp_path, device="NVIDIA H200", batch_size=256, gmacs=gmacs)
    result_file(tmp_path, device="NVIDIA H200", batch_size=128, gmacs=29.5)
    assert len(find_measured(tmp_path, ModelConfig(), "h200", 128)) == 1
    assert not find_measured(tmp_path, ModelConfig(), "a100", 128)


def test_the_command_prints_a_table_with_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gmacs = count_multiply_adds(ModelConfig())["training_step"] / 1e9
    result_file(tmp_path, device="NVIDIA H200", batch_size=128, gmacs=gmacs)
    command = ["bench", "--recipe", "cmae_vit_b", "--gpu", "h200"]
    assert main([*command, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("pixel decoder", "8756 images/s", "largest batch", "4000 images/s, 46% of the"):
        assert text in printed


def test_overrides_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--recipe", "mae_vit_b", "--gpu", "a100", "--json"]
    assert main([*command, "--batch_size", "256", "--model.depth", "24"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = ModelConfig(depth=24, contrastive_loss="none", mask_ratio=0.75, mask_unit=1)
    assert found["batch_size"] == 256
    expected = 2e-9 * count_multiply_adds(config)["training_step"]
    assert found["gflop_per_image"] == pytest.approx(expected)
    assert {part["part"] for part in found["parts"]} == {
        *("encoder", "pixel decoder", "losses", "optimiser"),
    }


def test_an_unknown_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--gpu", "h2000"]) == 1
    assert "h200" in capsys.readouterr().err


def test_this_device_can_be_measured() -> None:
    gpu = measure_device("fp32")
    assert 1e-3 < gpu.tflops < 5000
    assert 0.5 < gpu.gb_per_s < 20000
    assert gpu.memory_gb > 1
