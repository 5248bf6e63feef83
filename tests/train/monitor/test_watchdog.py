"""A run that no longer moves names the rank that keeps the others, and ends to be started again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.ranks import end_ranks, start_two_ranks
from support.tiny_runs import arguments, run

from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.train.loop.step_batches import StepBatches
from cmae.train.monitor import watchdog as module
from cmae.train.monitor.status import RunStatus, read_status
from cmae.train.monitor.watchdog import HUNG, Watchdog, explain


@pytest.fixture
def status(small_shards: str, tmp_path: Path) -> RunStatus:
    run(small_shards, tmp_path, **{"run.stop_at_step": 1})
    return replace(read_status(tmp_path)[0], world_size=6, time=1000.0, step=7, doing="in the step")


def test_the_rank_that_keeps_the_others_is_named_first(status: RunStatus) -> None:
    ranks = [replace(status, rank=rank) for rank in range(5)]
    ranks[1] = replace(ranks[1], doing="reading data", host="node-b", pid=77)
    ranks[3] = replace(ranks[3], time=900.0, step=6)
    assert explain(ranks) == [
        f"rank 3 ({status.host}, process {status.pid}) has been silent for 100 s: stopped, killed, or its "
        "machine is gone; its last step was 6",
        "rank 1 (node-b, process 77) is reading data after step 7",
        "ranks 0, 2, 4: in the step after step 7",
        "ranks 5 have written no status",
    ]


class Clock:
    """Time that goes on by what the watchdog sleeps, and by what a test adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now


def ticks(dog: Watchdog, clock: Clock, count: int, length_s: float = 1.0) -> None:
    """Let the watchdog look `count` times."""
    left = [count]

    def wait(timeout: float | None = None) -> bool:
        left[0] -= 1
        clock.now += length_s
        return left[0] < 0

    dog._stop = type("Stop", (), {"wait": staticmethod(wait)})()
    dog._run()


@pytest.mark.parametrize(
    ("before", "count", "length_s", "ends"),
    [
        ([], 100, 1.0, False),  # no step yet: it compiles
        ([0], 4, 1.0, False),
        ([0], 7, 1.0, True),
        ([0, 2], 19, 1.0, False),  # a step took 2 s
        ([0, 2], 22, 1.0, True),
        ([0], 5, 60.0, False),  # stopped for a minute, as by Ctrl-Z, five times
    ],
)
def test_it_ends_the_run_after_the_limit_and_not_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[int],
    count: int,
    length_s: float,
    ends: bool,
) -> None:
    clock, codes = Clock(monkeypatch), []
    dog = Watchdog(tmp_path, 0, limit_s=5, end=codes.append)
    for moment in before:
        clock.now = moment
        dog.moved()
    ticks(dog, clock, count, length_s)
    assert codes == ([HUNG] if ends else [])
    if ends:
        assert "test_watchdog.py" in (tmp_path / "hang" / "rank-0000.txt").read_text()


def test_time_for_an_evaluation_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, codes = Clock(monkeypatch), []
    dog = Watchdog(tmp_path, 0, limit_s=5, end=codes.append)
    dog.moved()
    with dog.paused("evaluating"):
        assert dog.doing == "evaluating"
        ticks(dog, clock, 100)
    ticks(dog, clock, 4)
    assert codes == []
    dog.rest("writing the last checkpoint")  # which may take an hour on a full disk
    ticks(dog, clock, 1000)
    assert codes == []


def test_a_stuck_read_ends_the_run_with_its_place(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stuck, real = threading.Event(), StepBatches._fetch

    def fetch(self: StepBatches, count: int) -> Any:
        if self.samples >= 24:
            stuck.wait(30)
        return real(self, count)

    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        stuck.set()

    monkeypatch.setattr(StepBatches, "_fetch", fetch)
    monkeypatch.setattr(Watchdog.__init__, "__kwdefaults__", {"end": end})
    monkeypatch.setattr(module, "_STEPS", 1)
    run(small_shards, tmp_path, **{"run.hang_s": 4, "data.remote_deadline_s": 1})
    assert codes == [HUNG]
    printed = capfd.readouterr().err
    assert "no step for" in printed
    assert "is reading data after step 2" in printed


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_goes_on_from_its_checkpoint(
    small_shards: str, tmp_path: Path
) -> None:
    out, settings = tmp_path / "run", {"optim.total_steps": 200, "run.checkpoint_every": 20}
    words = arguments(
        small_shards, out, **settings, **{"run.hang_s": 14, "data.remote_deadline_s": 1}
    )
    process = start_two_ranks("--max-restarts", "1", "pretrain", *words)
    try:
        wait_for(lambda: len(list_checkpoints(out / "checkpoints")) > 0)
        wait_for(lambda: len(read_status(out)) == 2)
        os.kill(read_status(out)[1].pid, signal.SIGSTOP)
        _, printed = process.communicate(timeout=150)
    finally:
        end_ranks(process)
    assert process.returncode == 0, printed
    assert "has been silent for" in printed
    assert "rank 1 (" in printed.split("seen by rank 0")[1]
    assert (out / "hang" / "rank-0000.txt").is_file()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == list(range(1, 201))
    assert load_checkpoint(list_checkpoints(out / "checkpoints")[-1])["step"] == 200
