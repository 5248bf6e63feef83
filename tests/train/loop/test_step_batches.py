"""Bad data in whole runs: counted over ranks and resumes, and above the limit all ranks stop alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from support.fault_data import bit_flip, noise
from support.pipeline_data import write_tar
from support.tiny_runs import arguments, run

from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.pipeline.bad_samples import BadLimit, read_ledger
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.loader.loader import Loader
from cmae.train.distributed import World
from cmae.train.loop import pretrain
from cmae.train.loop.step_batches import StepBatches
from cmae.train.loop.training import TrainingError
from cmae.train.monitor.metrics import read_metrics

NUM = 40


def write_shard(folder: Path, bad: list[int]) -> str:
    """One indexed shard of 40 images, some of which changed since."""
    path = write_tar(folder / "part-000.tar", [(f"{i:03d}", noise(i), i % 4) for i in range(NUM)])
    assert build_indices([str(path)])[0].error is None
    with tarfile.open(path) as tar:
        places = {i: tar.getmember(f"{i:03d}.jpg") for i in bad}
    with open(path, "r+b") as file:
        for member in places.values():
            assert 65536 < member.offset_data < path.stat().st_size - 2 * 65536
            file.seek(member.offset_data)
            data = file.read(member.size)
            file.seek(member.offset_data)
            file.write(bit_flip(data))
    return str(path)


def newest(out: Path) -> dict:
    return load_checkpoint(list_checkpoints(out / "checkpoints")[-1])


def lines_of(out: Path) -> list[tuple[int, int]]:
    return sorted(
        (line.epoch, line.record_number) for line in read_ledger(out / "bad_samples.jsonl")
    )


@pytest.mark.slow
def test_counts_and_ledger_of_a_run_in_pieces_are_those_of_a_whole_one(tmp_path: Path) -> None:
    shards = write_shard(tmp_path, [9, 14, 20])
    settings = {"optim.total_steps": 12, "run.checkpoint_every": 5, "data.max_bad_fraction": 1.0}
    run(shards, tmp_path / "whole", **settings)
    for stop in (3, 4, 9, 12):
        run(shards, tmp_path / "pieces", **settings, **{"run.stop_at_step": stop})
    # As after a kill: what came after the newest checkpoint is done again, and met again.
    list_checkpoints(tmp_path / "pieces" / "checkpoints")[-1].unlink()
    run(shards, tmp_path / "pieces", **settings)
    assert newest(tmp_path / "whole")["data_health"]["samples"] == 96
    for name in ("data_health", "loader"):
        assert newest(tmp_path / "pieces")[name] == newest(tmp_path / "whole")[name]
    lines = lines_of(tmp_path / "pieces")
    assert len(lines) == len(set(lines))
    # The read-ahead of an interrupted piece is never handed out, hence never listed.
    assert lines == lines_of(tmp_path / "whole")
    assert [line for line in lines if line[0] == 1] == [(1, 9), (1, 14), (1, 20)]
    last = read_metrics(tmp_path / "pieces" / "metrics.jsonl")[-1]
    assert last["bad_samples"] == newest(tmp_path / "whole")["data_health"]["bad"] >= 6


def test_above_the_limit_a_checkpoint_is_written_and_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "BadLimit", partial(BadLimit, probation=30))
    shards, out = write_shard(tmp_path, [9, 14, 20]), tmp_path / "run"
    settings = {"optim.total_steps": 20, "run.checkpoint_every": 100}
    with pytest.raises(TrainingError, match=r"of (32|40) samples are bad.*shards repair"):
        run(shards, out, **settings)
    stopped = newest(out)
    assert stopped["step"] == stopped["data_health"]["samples"] // 8 == 3
    # The same data with a higher limit goes on from there.
    assert run(shards, out, **settings, **{"data.max_bad_fraction": 0.2}).step == 20
    assert newest(out)["data_health"]["samples"] == 160


def test_batches_that_all_come_late_end_the_step_before_the_collective_does(tmp_path: Path) -> None:
    class Slow:
        state, bad_samples = None, 0

        def __next__(self) -> object:
            time.sleep(0.05)
            return object()

    world = World(0, 2, torch.device("cpu"))
    step_batches = StepBatches(
        Slow(),
        world,
        limit=BadLimit(0.1),
        ledger=tmp_path / "x",
        global_batch_size=8,
        stop_signal=lambda: 0,
        deadline_s=0.12,
    )
    batches, error = step_batches._fetch(8)
    assert batches == []
    assert re.search(r"3 of the 8 micro-batches .*remote_deadline_s=0\.12.*cache_dir", error)
    assert len(step_batches._fetch(2)[0]) == 2


def launch(shards: str, out: Path, **overrides: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "cmae.train", "pretrain"]
    settings = {"optim.total_steps": 100000, "run.checkpoint_every": 100000, "run.log_every": 1000}
    command += arguments(shards, out, **settings, **{"data.num_threads": 1}, **overrides)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_ranks_stop_together_with_one_message(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = launch(write_shard(tmp_path, [9, 14, 20]), out)
    assert done.returncode != 0
    assert done.stderr.count("cmae pretrain: error:") == 1
    message = next(line for line in done.stderr.splitlines() if "cmae pretrain: error:" in line)
    for part in (
        "on all ranks",
        "of 1000 samples are bad",
        str(out / "bad_samples.jsonl"),
        "cmae shards verify",
        "cmae shards repair",
    ):
        assert part in message
    stopped = newest(out)
    assert stopped["step"] == 124  # 1000 samples in steps of 8, and the last of them was not taken
    assert stopped["data_health"]["samples"] == 992
    # Both ranks met some of them, and the count is of both.
    assert stopped["data_health"]["bad"] >= 3 * 24
    assert len(set(lines_of(out))) == len(lines_of(out))


@pytest.mark.slow
def test_a_rank_that_cannot_fetch_stops_the_others_too(tmp_path: Path) -> None:
    # One shard a rank; the second holds too few good samples for a batch.
    good = write_tar(tmp_path / "a.tar", [(f"a{i}", noise(i, 40, 40), 0) for i in range(8)])
    bad = write_tar(tmp_path / "b.tar", [("b", noise(0, 40, 40), 0)])
    out = tmp_path / "run"
    done = launch(f"['{good}', '{bad}']", out, **{"data.source": "stream", "data.shuffle": False})
    assert done.returncode != 0
    assert done.stderr.count("cmae pretrain: error:") == 1
    assert "rank 1: rank 1's shards hold fewer than batch_size=4" in done.stderr


class Numbered:
    """A loader whose batches and states are numbers."""

    def __init__(self) -> None:
        self.state, self.bad_samples = 0, 0

    def __next__(self) -> int:
        self.state += 1
        self.bad_samples += 1
        return self.state


def numbered(tmp_path: Path, stop_signal: Callable[[], int] = lambda: 0) -> StepBatches:
    return StepBatches(
        cast(Loader, Numbered()),
        World(0, 1, torch.device("cpu")),
        limit=BadLimit(1.0),
        ledger=tmp_path / "x",
        global_batch_size=2,
        stop_signal=stop_signal,
    )


def test_what_is_fetched_ahead_counts_when_it_is_given_out(tmp_path: Path) -> None:
    step_batches = numbered(tmp_path)
    assert step_batches.next_batches(2) == [1, 2]
    step_batches.fetch_ahead(2)
    step_batches.fetch_ahead(2)  # once is enough
    assert step_batches._loader.state == 4
    assert (step_batches._state, step_batches.bad_samples, step_batches.samples) == (2, 2, 2)
    assert step_batches.next_batches(2) == [3, 4]
    assert (step_batches._state, step_batches.bad_samples, step_batches.samples) == (4, 4, 4)


def test_a_signal_after_the_fetch_stops_before_the_step(tmp_path: Path) -> None:
    signals = [0]
    step_batches = numbered(tmp_path, lambda: signals[-1])
    step_batches.fetch_ahead(2)
    signals.append(15)
    assert step_batches.next_batches(2) is None
    assert step_batches.signal == 15
    assert step_batches._state == 0
