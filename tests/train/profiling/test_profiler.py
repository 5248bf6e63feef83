"""A run is profiled from end to end; what is named where is tested on simulated runs in analysis/."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_runs import ALONE, OPTIM, SMALL, make_batch

from cmae.model import build_model, set_all_reduce
from cmae.train.commands.main import main
from cmae.train.config import SpeedConfig
from cmae.train.distributed import World, sum_over_ranks
from cmae.train.loop.step import TrainStep
from cmae.train.profiling.analysis.records import Profile, load_profile

ROOT = Path(__file__).resolve().parents[3]


def components_of(found: Profile) -> dict[str, float]:
    components = {one.name: one.ms.value for one in found.breakdown}
    assert sum(components.values()) == pytest.approx(found.step_ms.value)
    return components


@pytest.mark.slow
def test_profile_of_a_real_step_sums_up_and_is_written(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--model.img_size 16 --data.views.source_crop_size 20 --data.views.target_shift 4"
    model = (
        "--model.patch_size 8 --model.embed_dim 32 --model.depth 1 --model.num_heads 2 "
        "--model.decoder_embed_dim 32 --model.decoder_depth 1 --model.decoder_num_heads 2 "
        "--model.proj_hidden_dim 32 --model.proj_dim 16 --optim.global_batch_size 8"
    )
    options = "--profile.rounds 2 --profile.steps 4 --profile.verify 1 --profile.budget_s 36000"
    code = main(
        [
            *("profile", "--recipe", "demo", "--data.shards", small_shards),
            *f"{sizes} {model} {options} --speed.device cpu".split(),
            *("--profile.out", str(tmp_path / "profile")),
        ]
    )
    assert code == 0
    found = load_profile(tmp_path / "profile" / "profile.json")
    components_of(found)
    assert {
        *("synthetic", "replay", "interference", "prefetch", "memory", "warm", "cold", "full"),
    } <= {phase.name for phase in found.phases}
    assert [one.name for one in found.operations][:3] == ["decode", "resize, flip", "crop"]
    assert found.slow_images[0]["jpeg_kind"] == "baseline"
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert found.diagnosis.sentence in printed
    assert (tmp_path / "profile" / "report.html").is_file()
    assert not list(tmp_path.glob("**/checkpoints"))


def test_a_step_without_collectives_talks_to_no_other_rank() -> None:
    config = replace(SMALL, head_norm="batch")
    step = TrainStep(build_model(config, seed=0), OPTIM, SpeedConfig(), ALONE)
    batches = [make_batch(config, 0, 8, torch.float32)]
    alone, _ = step(batches, lr=0.0, momentum=1.0)
    # Two ranks of which there is no second, nor a process group to reach it.
    step.world = World(0, 2, ALONE.device)
    set_all_reduce(step.model, sum_over_ranks)
    with step.without_collectives():
        losses, _ = step(batches, lr=0.0, momentum=1.0)
    torch.testing.assert_close(losses, alone)
    assert step.world.world_size == 2
    with pytest.raises(ValueError, match="process group"):
        step(batches, lr=0.0, momentum=1.0)


@pytest.mark.slow
def test_two_ranks_are_measured_alone_and_together(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = tmp_path / "profile.json"
    command = [*launch, str(ROOT / "benchmarks" / "planted.py"), "--slow-rank", str(path)]
    command += ["--rounds", "2", "--steps", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
    found = load_profile(path)
    assert found.world_size == 2
    assert {"straggler", "collective"} <= set(components_of(found))
    assert [one["rank"] for one in found.ranks] == [0, 1]
    # Each rank sleeps at least as long as its step: the second one by 100 ms more.
    assert found.ranks[0]["step_ms"] >= 60
    assert found.ranks[1]["step_ms"] >= 160
