"""A step of every rank without numbers: memory by hand, and a rank that goes its own way is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny_runs import SMALL

from cmae.model import count_parameters
from cmae.pipeline import LoaderConfig, ViewConfig
from cmae.train.commands.main import main
from cmae.train.commands.plan.dry_run import describe, first_difference, run_rank
from cmae.train.config import Config, OptimConfig, SpeedConfig
from cmae.train.loop.step import TrainStep

NUM_RANKS = 4


def ranks(way: str, numbers: range = range(NUM_RANKS), **speed: Any) -> list[Any]:
    config = Config(
        data=LoaderConfig(
            views=ViewConfig(img_size=SMALL.img_size, source_crop_size=40, target_shift=8)
        ),
        model=replace(SMALL, embed_dim=48, depth=3),
        optim=OptimConfig(global_batch_size=32),
        speed=SpeedConfig(parallel=way, **speed),  # type: ignore[arg-type]
    )
    return [
        run_rank(config, rank=rank, num_ranks=NUM_RANKS, per_node=2, micro_batch_size=4)
        for rank in numbers
    ]


@pytest.mark.parametrize("way", ["ddp", "zero1", "fsdp", "hsdp"])
def test_all_ranks_send_the_same_and_hold_their_share(way: str) -> None:
    runs = ranks(way)
    assert first_difference(runs) == ""
    sent = runs[0].sent
    counts = count_parameters(replace(SMALL, embed_dim=48, depth=3))
    online, target = 4 * counts["online"], 4 * counts["target"]
    weights, moments = {"ddp": (1, 1), "zero1": (1, 4), "fsdp": (4, 4), "hsdp": (2, 2)}[way]
    expected = (online + target) / weights + 2 * online / moments
    expected += online if weights == 1 else 0  # DDP keeps its buckets
    # Position tables, and room for parts of unlike size.
    tables = 4 * 3 * 17 * 48
    assert runs[0].held_bytes == pytest.approx(expected, rel=0.12, abs=tables)
    assert runs[0].peak_bytes > runs[0].held_bytes
    keys = 4 * 32 // 2 * SMALL.proj_dim
    if way in ("ddp", "zero1"):  # two micro-batches: gradients travel with the last, keys with both
        assert sent["all-gather"] == (2, 2 * keys)
        assert sent["all-reduce"][1] == pytest.approx(online, rel=0.05)
    else:
        assert sent["reduce-scatter"][1] == pytest.approx(2 * online, rel=0.1)
    assert ("broadcast" in sent) == (way == "zero1")


def test_recomputed_blocks_need_less() -> None:
    kept, recomputed = (ranks("fsdp", range(1), recompute=how)[0] for how in ("none", "blocks"))
    assert recomputed.peak_bytes < 0.95 * kept.peak_bytes


def test_a_rank_that_sends_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = TrainStep.move_target

    def planted(self: TrainStep, momentum: float) -> None:
        if self.world.rank == 2:
            dist.all_reduce(torch.zeros(3))
        follow(self, momentum)

    monkeypatch.setattr(TrainStep, "move_target", planted)
    runs = ranks("ddp")
    place = len(runs[0].messages) + 1
    difference = first_difference(runs)
    assert difference == (
        f"collective {place} of a step: rank 0 has nothing, rank 2 has all-reduce 3 float32"
    )
    assert "ORDER DIFFERS" in describe(runs, memory_gb=1.0)[0]


@pytest.mark.slow
def test_the_command_says_what_the_ranks_did(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--gpus", "2xa100", "--recipe", "tiny_imagenet", "--dry_run"]
    assert main([*words, "--set", "speed.parallel=fsdp"]) == 0
    shown = capsys.readouterr().out
    assert "2 rank(s), " in shown
    assert "the same order on every rank" in shown
    assert "memory of a rank" in shown
