"""Bottlenecks that are put there on purpose are named; loaders that are not ours are profiled too.

Faults and steps here sleep, so that a busy machine does not change what binds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.records import Extent
from cmae.train.commands.main import main
from cmae.train.profiling import profile_loader
from cmae.train.profiling.analysis.records import Profile, load_profile
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.page_cache import evict, resident_fraction, touch
from cmae.train.profiling.measure.phases import spread_out
from cmae.train.profiling.measure.switches import SwitchedSource
from cmae.train.profiling.measure.trials import override
from cmae.train.profiling.profiler import open_subject, verify

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))
import planted  # noqa: E402

QUICK = ProfileConfig(rounds=2, steps=4, budget_s=120, trials=False)


def parts_of(found: Profile) -> dict[str, float]:
    parts = {part.name: part.ms.value for part in found.parts}
    assert sum(parts.values()) == pytest.approx(found.step_ms.value)
    return parts


def plant(name: str, folder: Path) -> Profile:
    fault = next(fault for fault in planted.FAULTS if fault.name == name)
    few = {**fault.photographs, "count": 48, "per_shard": 24}
    found = planted.plant(replace(fault, photographs=few), folder, QUICK)
    assert found.verdict.binds in fault.expect
    return found


def test_a_slow_step_is_named_with_the_loaders_head_room(tmp_path: Path) -> None:
    found = plant("slow model", tmp_path)
    assert found.verdict.headroom > 1.3
    assert parts_of(found)["model"] == pytest.approx(250, rel=0.2)


def test_a_slow_stage_of_the_feed_thread_is_named(tmp_path: Path) -> None:
    found = plant("slow stage", tmp_path)
    assert parts_of(found)["feed"] == pytest.approx(
        140, rel=0.3
    )  # 200 ms, of which the step hides 60


def test_a_slow_network_is_named_and_more_readers_would_help(tmp_path: Path) -> None:
    found = plant("slow network", tmp_path)
    assert any("batches at a time" in action.what for action in found.actions)


def test_a_prediction_for_readers_comes_true(tmp_path: Path) -> None:
    fault = next(fault for fault in planted.FAULTS if fault.name == "slow network")
    config = planted.build_config(planted.write_photographs(tmp_path, count=48), threads=2)
    world = planted.World(0, 1, torch.device("cpu"))
    options = replace(QUICK, steps=8)
    with planted.open_subject(config, world, fault.step, wrap=fault.wrap) as subject:
        found = planted.measure(subject, options, config)
        doubled = [one for one in found.actions if one.overrides == {"speed.num_readers": 8}]
        measured = verify(
            subject,
            config,
            doubled,
            options=replace(options, verify=1),
            steps=8,
            base_rates=[planted.BATCH_SIZE * 1000 / found.step_ms.value],
            say=print,
        )
    rate = measured[0].measured_images_per_s
    assert rate is not None
    assert measured[0].predicted_images_per_s == pytest.approx(rate.value, rel=0.3)


def test_a_slow_disk_is_named_and_more_readers_would_not_help(tmp_path: Path) -> None:
    fault = replace(
        next(fault for fault in planted.FAULTS if fault.name == "slow disk"),
        wrap=planted.slow_files(bytes_per_s=0.5e6),
        photographs={"count": 48},
    )
    found = planted.plant(fault, tmp_path, QUICK)
    assert found.verdict.binds == "storage"
    best = found.step_ms.value / 1000
    for action in found.actions:
        if "batches at a time" in action.what:
            assert action.predicted_images_per_s < 1.3 * planted.BATCH_SIZE / best


def test_files_to_evict_are_spread_over_all() -> None:
    extents = [Extent("x", number, 1) for number in range(10)]
    assert [one.byte_offset for one in spread_out(extents, 0.3)] == [3, 6, 9]
    assert spread_out(extents, 1.0) == extents
    assert spread_out(extents, 0.0) == []


def test_python_in_the_training_thread_is_named(tmp_path: Path) -> None:
    found = plant("Python in the training thread", tmp_path)
    assert parts_of(found)["python"] > 60


def test_profile_of_a_real_step_sums_up_and_is_written(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--model.img_size 16 --data.views.source_crop_size 20 --data.views.target_shift 4"
    model = (
        "--model.patch_size 8 --model.embed_dim 32 --model.depth 1 --model.num_heads 2 "
        "--model.decoder_embed_dim 32 --model.decoder_depth 1 --model.decoder_num_heads 2 "
        "--model.proj_hidden_dim 32 --model.proj_dim 16 --optim.global_batch_size 8"
    )
    options = "--profile.rounds 2 --profile.steps 4 --profile.verify 1 --profile.budget_s 60"
    code = main(
        [
            *("profile", "--recipe", "demo", "--data.shards", small_shards),
            *f"{sizes} {model} {options} --speed.device cpu".split(),
            *("--profile.out", str(tmp_path / "profile")),
        ]
    )
    assert code == 0
    found = load_profile(tmp_path / "profile" / "profile.json")
    parts_of(found)
    assert {"synthetic", "replay", "interference", "feed", "memory", "warm", "cold", "full"} <= {
        phase.name for phase in found.phases
    }
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert found.verdict.sentence in printed
    assert not list(tmp_path.glob("**/checkpoints"))


@pytest.mark.gpu
def test_slow_copies_to_the_device_are_named() -> None:
    weight = torch.randn(1024, 1024, device="cuda")
    batches = [torch.randn(16, 1_000_000) for _ in range(4)]  # 64 MB, pageable

    def step(batch: torch.Tensor) -> None:
        on_device = batch.to("cuda")
        for _ in range(20):
            torch.mm(weight, on_device[:1, :1024].expand(1024, 1024))

    found = profile_loader(batches, step, rounds=3, device="cuda")
    assert found.verdict.binds == "h2d"
    assert parts_of(found)["host_to_device"] > 0.5 * found.step_ms.value


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [str(ROOT / "benchmarks" / "planted.py"), "--slow-rank", str(tmp_path / "p.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    found = load_profile(tmp_path / "p.json")
    assert found.verdict.binds == "straggler"
    assert parts_of(found)["straggler"] == pytest.approx(100, rel=0.3)
    assert found.world_size == 2
    assert [one["rank"] for one in found.world] == [0, 1]
    assert found.world[1]["step_ms"] > found.world[0]["step_ms"] + 50


class SlowImages(Dataset[torch.Tensor]):
    """Images that each take a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.zeros(3, 8, 8)


def test_a_data_loader_that_is_too_slow_is_named() -> None:
    loader = DataLoader(SlowImages(0.02), batch_size=8, num_workers=2, prefetch_factor=1)
    found = profile_loader(loader, lambda batch: time.sleep(0.02), rounds=3, steps=4)
    assert found.verdict.binds == "loader"
    # Two workers bring a batch every 80 ms, of which a step hides 20; a busy machine wakes them late.
    assert 40 < parts_of(found)["loader"] < 200
    assert found.global_batch_size == 8


def test_a_data_loader_with_room_leaves_the_model_to_bind() -> None:
    loader = DataLoader(SlowImages(0.001), batch_size=8, num_workers=2)
    found = profile_loader(loader, lambda batch: time.sleep(0.15), rounds=3, steps=4)
    assert found.verdict.binds == "model"
    assert found.verdict.headroom > 3


def test_a_loader_that_works_in_the_training_thread_is_named() -> None:
    def batches() -> Iterator[torch.Tensor]:
        while True:
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            yield torch.zeros(8, 1)

    found = profile_loader(batches(), lambda batch: time.sleep(0.02), rounds=3, steps=4)
    assert found.verdict.binds == "python"
    assert "works in the training thread" in found.verdict.sentence
    assert parts_of(found)["python"] > 15


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        profile_loader([], lambda batch: None)


def test_pages_leave_the_cache_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    extents = [Extent(str(path), start, 1 << 16) for start in range(0, 1 << 20, 1 << 16)]
    if resident_fraction(extents) is None:
        pytest.skip("this file system does not say what is cached")
    touch(extents)
    assert resident_fraction(extents) == 1
    evict(extents)
    assert resident_fraction(extents) == 0


def test_upcoming_extents_hold_the_bytes_that_are_read(small_shards: str) -> None:
    with open_quick(small_shards) as subject:
        source = subject.source
        extents, after = source.upcoming(subject.start, 2)
        first = source.read(subject.start)
        second = source.read(source.upcoming(subject.start, 1)[1])
        records = [*first.records, *second.records]
        for extent, record in zip(extents, records, strict=True):
            with open(extent.path, "rb") as file:
                file.seek(extent.byte_offset)
                assert file.read(extent.size) == record.data.tobytes()
        assert second.state == after


def test_memory_gives_again_what_storage_gave(small_shards: str) -> None:
    with open_quick(small_shards) as subject:
        inner = subject.source.inner
        assert isinstance(inner, IndexedSource)
        source = SwitchedSource(inner)
        number = source.switch("storage", record=True)
        batches = source.batches(subject.start)
        seen = [next(batches) for _ in range(3)]
        assert {raw.state.epoch for raw in seen} == {number}
        again = source.switch("memory")
        replayed = [next(batches) for _ in range(4)]
        assert {raw.state.epoch for raw in replayed} == {again}
        for raw, other in zip([*seen, seen[0]], replayed, strict=True):
            assert np.array_equal(raw.sample_id, other.sample_id)
            pairs = zip(raw.encoded, other.encoded, strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)


def open_quick(shards: str) -> Iterator[object]:
    config = planted.build_config(shards, threads=1)
    world = planted.World(0, 1, torch.device("cpu"))
    return open_subject(config, world, lambda batches: None)


def test_overrides_reach_nested_settings_and_refuse_unknown_ones(small_shards: str) -> None:
    config = planted.build_config(small_shards, threads=1)
    changed = override(config, {"speed.num_threads": 3, "data.views.color": "fast"})
    assert (changed.speed.num_threads, changed.data.views.color) == (3, "fast")
    with pytest.raises(ValueError, match=r"speed\.num_thread is no setting"):
        override(config, {"speed.num_thread": 3})
