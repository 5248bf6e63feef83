"""What a run publishes while it goes, and what `cmae top` makes of it."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.fake_time import FakeTime
from support.profile_data import loader

from cmae.pipeline.stage_stats import LoaderSnapshot
from cmae.train.commands.top import condition, frame, stragglers, top, verdict
from cmae.train.distributed import World
from cmae.train.monitor import status as status_module
from cmae.train.monitor.status import RunStatus, StatusPublisher, read_status, status_folder

NOW = 1_800_000_000.0
CPU = torch.device("cpu")


def window(**changes: Any) -> LoaderSnapshot:
    return replace(LoaderSnapshot.from_dict(loader()), **changes)


def status(rank: int = 0, **changes: Any) -> RunStatus:
    values = {
        "rank": rank,
        "world_size": 1,
        "host": "node-a",
        "pid": os.getpid(),
        "device": "cuda:0",
        "state": "running",
        "time": NOW - 1,
        "step": 100,
        "total_steps": 1000,
        "global_batch_size": 256,
        "step_age_s": 0.1,
        "step_ms": 268.0,
        "loss": 1.2345,
        "window": window(),
    }
    return RunStatus(**values | changes)


def waiting(share: float) -> LoaderSnapshot:
    return window(wait_s=30.0 * share)


def drawn(statuses: list[RunStatus], width: int = 130) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(frame(Path("runs/x"), statuses, now=NOW, width=width))
    return console.file.getvalue()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    found = FakeTime()
    monkeypatch.setattr(status_module, "time", found)
    return found


def publisher(
    out: Path, *, rank: int = 0, world_size: int = 1, every_s: float = 60.0
) -> StatusPublisher:
    """Of a loader that waits a tenth of every second."""
    begun = status_module.time.perf_counter()

    def snapshot() -> LoaderSnapshot:
        elapsed = status_module.time.perf_counter() - begun
        return window(time_s=elapsed, wait_s=0.1 * elapsed)

    return StatusPublisher(
        out,
        World(rank, world_size, CPU),
        step=0,
        total_steps=3,
        global_batch_size=8,
        snapshot=snapshot,
        every_s=every_s,
    )


class TestPublisher:
    def test_a_status_reads_back_equal(self, tmp_path: Path) -> None:
        status_folder(tmp_path).mkdir()
        written = status(gpu={"sm_pct": 50.0})
        written.save(status_folder(tmp_path) / "rank-0000.json")
        assert read_status(tmp_path) == [written]

    def test_a_run_publishes_steps_rate_and_wait(self, tmp_path: Path, fake: FakeTime) -> None:
        with publisher(tmp_path, every_s=0.01) as live:
            for step in (1, 2):
                fake.wait(0.1)
                live.step(step)
            live.loss = 2.5
            fake.wait(0.1)
            while not (tmp_path / "live" / "rank-0000.json").is_file():
                pass
            while (found := read_status(tmp_path)[0]).loss is None or found.step_age_s < 0.09:
                pass
        assert (found.state, found.step, found.loss) == ("running", 2, 2.5)
        assert found.step_ms == pytest.approx(100)
        assert found.images_per_s == pytest.approx(80)
        assert found.wait_share == pytest.approx(0.1)
        assert (found.host, found.pid) == (socket.gethostname(), os.getpid())

    def test_the_first_step_is_not_in_the_rate(self, tmp_path: Path, fake: FakeTime) -> None:
        with publisher(tmp_path) as live:
            # It compiles.
            fake.wait(50.0)
            for step in (1, 2, 3):
                live.step(step)
                fake.wait(0.1)
        (found,) = read_status(tmp_path)
        assert found.step_ms == pytest.approx(100)

    def test_the_end_is_written(self, tmp_path: Path) -> None:
        with publisher(tmp_path) as live:
            live.step(2)
        assert read_status(tmp_path)[0].state == "stopped"
        with publisher(tmp_path) as live:
            live.step(3)
        assert read_status(tmp_path)[0].state == "finished"
        with pytest.raises(ZeroDivisionError), publisher(tmp_path):
            raise ZeroDivisionError("three by zero")
        failed = read_status(tmp_path)[0]
        assert (failed.state, failed.error) == ("failed", "ZeroDivisionError: three by zero")

    def test_marks_do_not_pile_up_in_a_long_step(self, tmp_path: Path) -> None:
        live = publisher(tmp_path)
        live.step(1)
        live.step(2)
        for _ in range(50):
            live._status("running", "")
        assert len(live._marks) <= 2

    def test_the_first_rank_removes_what_more_ranks_left(self, tmp_path: Path) -> None:
        for rank in range(3):
            with publisher(tmp_path, rank=rank, world_size=3):
                pass
        with publisher(tmp_path, rank=0, world_size=2):
            assert [one.rank for one in read_status(tmp_path)] == [0, 1]

    def test_a_folder_that_cannot_be_written_does_not_stop_the_run(self, tmp_path: Path) -> None:
        (tmp_path / "live").write_text("a file where the folder should be")
        with publisher(tmp_path) as live:
            live.step(1)
        assert isinstance(live.error, OSError)

    def test_a_folder_without_a_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"name the folder \(run\.out\)"):
            read_status(tmp_path)


class TestCondition:
    def test_a_rank_that_writes_is_running(self) -> None:
        assert condition(status(), NOW) == "running"

    def test_silence_is_death(self) -> None:
        assert condition(status(time=NOW - 16), NOW) == "dead"

    def test_a_process_that_is_gone_is_dead_at_once(self) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        gone = status(host=socket.gethostname(), pid=process.pid)
        assert condition(gone, NOW) == "dead"
        assert condition(replace(gone, host="elsewhere"), NOW) == "running"

    def test_a_step_that_does_not_end_is_stuck(self) -> None:
        assert condition(status(step_age_s=29.0), NOW) == "running"
        assert condition(status(step_age_s=31.0), NOW) == "stuck"
        assert condition(status(step_age_s=31.0, step_ms=10_000.0), NOW) == "running"


class TestVerdict:
    def test_waiting_names_the_busy_stage(self) -> None:
        assert verdict([status()], NOW) == (
            "Bound by decode and augmentation (8 threads, 97% busy): "
            "62% of the step is waiting for data."
        )

    def test_no_waiting_names_the_model(self) -> None:
        found = verdict([status(window=waiting(0.01))], NOW)
        assert found.startswith("The model is the bottleneck")
        assert "1.0x head-room" in found  # 1 / 0.97: decoding is 97 % busy

    def test_ends_are_said_before_rates(self) -> None:
        world = [status(rank, world_size=2) for rank in range(2)]
        dead = [world[0], replace(world[1], time=NOW - 3700)]
        assert verdict(dead, NOW).startswith("Dead: rank 1 (node-a")
        assert "1:01:40" in verdict(dead, NOW)
        failed = [world[0], replace(world[1], state="failed", error="ValueError: x")]
        assert verdict(failed, NOW) == "Failed: rank 1: ValueError: x"
        done = [replace(one, state="finished") for one in world]
        assert verdict(done, NOW).startswith("The run has finished")
        stuck = [world[0], replace(world[1], step_age_s=99.0)]
        assert verdict(stuck, NOW) == "Stuck: rank 1 has done no step for 99 s."

    def test_a_rank_that_has_not_come_up_is_named(self) -> None:
        assert verdict([status(0, world_size=2)], NOW) == "rank 1 has written nothing yet."

    def test_a_run_that_only_starts_has_no_verdict_yet(self) -> None:
        assert verdict([status(step_ms=None)], NOW).startswith("Starting")


class TestStragglers:
    def test_the_rank_that_waits_longest_is_named(self) -> None:
        world = [status(i, world_size=4, window=waiting(0.02)) for i in range(4)]
        assert list(stragglers(world, NOW)) == []
        world[2] = replace(world[2], window=waiting(0.4), host="node-b")
        (line,) = stragglers(world, NOW)
        assert line == ("straggler: rank 2 (node-b): waits for data 40% of the step, the others 2%")

    def test_a_slow_clock_is_named(self) -> None:
        world = [status(i, world_size=4, gpu={"sm_clock_mhz": 1700.0}) for i in range(4)]
        world[3] = replace(world[3], gpu={"sm_clock_mhz": 1100.0})
        (line,) = stragglers(world, NOW)
        assert "rank 3" in line
        assert "1100 MHz, the others 1700" in line

    def test_one_rank_has_nobody_to_wait_for(self) -> None:
        assert list(stragglers([status()], NOW)) == []


class TestFrame:
    @pytest.mark.parametrize("width", [80, 130])
    def test_it_shows_ranks_stages_and_verdict(self, width: int) -> None:
        text = drawn([status(i, world_size=2) for i in range(2)], width)
        assert "step 100/1000 (10%)" in text
        assert "955 images/s" in text
        assert "loss 1.2345" in text
        assert "Bound by decode and augmentation" in text
        assert text.count("node-a") == 2
        assert "Stages of 2 ranks" in text

    def test_many_ranks_show_those_that_wait(self) -> None:
        world = [status(i, world_size=64, window=waiting(i / 100)) for i in range(64)]
        text = drawn(world)
        assert "the 32 of 64 ranks" in text
        assert "│ 63 " in text
        assert "│ 31 " not in text


class TestTop:
    def test_one_frame_for_a_log(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        # Later than now: however long the test takes, the file is not old.
        status(time=time.time() + 3600).save(path)
        assert top(tmp_path, once=True) == 0
        assert "Bound by" in capsys.readouterr().out
        status(time=time.time() - 60).save(path)
        assert top(tmp_path, once=True) == 1
        assert "Dead" in capsys.readouterr().out

    def test_it_starts_without_torch(self) -> None:
        found = "import sys, cmae.train.commands.top; print({'torch', 'scipy'} & set(sys.modules))"
        printed = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
        assert printed.stdout.strip() == "set()"
