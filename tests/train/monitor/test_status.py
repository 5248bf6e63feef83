"""What a run publishes while it goes, and what `cmae top` makes of it."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_time import FakeTime
from support.profile_data import loader

from cmae.errors import CmaeError
from cmae.pipeline.stage_stats import LoaderSnapshot
from cmae.train.commands.look import top as top_module
from cmae.train.commands.look.top import condition, frame, stragglers, top, verdict
from cmae.train.distributed import World
from cmae.train.machine import process_is_gone, process_space, process_start
from cmae.train.monitor import status as status_module
from cmae.train.monitor.console import PlainConsole
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
    console = PlainConsole(file=io.StringIO(), width=width)
    console.print(frame(Path("runs/x"), statuses, now=NOW, width=width))
    return console.file.getvalue()


def wait_for(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self, now: float, on_sleep: Callable[[float], object] = lambda now: None) -> None:
        self._now, self._on_sleep = now, on_sleep

    def time(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        self._on_sleep(self._now)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    found = FakeTime()
    monkeypatch.setattr(status_module, "time", found)
    return found


def publisher(
    out: Path, *, rank: int = 0, world_size: int = 1, every_s: float = 60.0, **options: Any
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
        **options,
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

    def test_a_failed_writing_is_tried_again_for_as_long_as_the_run_goes(
        self, tmp_path: Path
    ) -> None:
        obstacle = tmp_path / "live"
        obstacle.write_text("a file where the folder should be")
        with publisher(tmp_path, every_s=0.01) as live:
            live.step(1)
            wait_for(lambda: live.error is not None)
            assert isinstance(live.error, OSError)
            obstacle.unlink()
            wait_for(lambda: live.error is None)
            assert read_status(tmp_path)[0].step == 1

    def test_a_driver_that_fails_for_once_does_not_end_the_news(self, tmp_path: Path) -> None:
        readings = iter([RuntimeError("GPU is lost"), {"sm_pct": 7.0}])

        def read_gpu() -> dict[str, float]:
            found = next(readings, {"sm_pct": 7.0})
            if isinstance(found, Exception):
                raise found
            return found

        with publisher(tmp_path, every_s=0.01, read_gpu=read_gpu):
            wait_for((tmp_path / "live" / "rank-0000.json").is_file)
        assert read_status(tmp_path)[0].gpu == {"sm_pct": 7.0}

    def test_files_of_others_in_the_folder_are_left_alone(self, tmp_path: Path) -> None:
        status_folder(tmp_path).mkdir()
        other = status_folder(tmp_path) / "rank-old.json"
        other.write_text("{}")
        with publisher(tmp_path):
            pass
        assert other.is_file()

    def test_a_loss_that_is_no_number_is_null_in_the_file(self, tmp_path: Path) -> None:
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        status(loss=float("nan")).save(path)
        assert "NaN" not in path.read_text()
        assert read_status(tmp_path)[0].loss is None

    def test_a_status_of_the_version_before_is_read(self, tmp_path: Path) -> None:
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        status().save(path)
        old = json.loads(path.read_text()) | {"format": 1}
        del old["process_space"], old["process_start"]
        path.write_text(json.dumps(old))
        assert condition(read_status(tmp_path)[0], NOW) == "running"

    @pytest.mark.parametrize(
        "change",
        [
            {"world_size": 10**12},
            {"rank": 5},
            {"pid": 0},
            {"pid": 1 << 70},
            {"step": "many"},
            {"time": None},
            {"time": float("nan")},
            {"state": "[/x]"},
            {"host": ["a"]},
            {"window": {}},
            {"window": 3},
            {"window": LoaderSnapshot.from_dict(loader()).to_dict() | {"stages": {"read": 1}}},
            {"gpu": {"sm_pct": "fast"}},
            {"format": 99},
            None,
        ],
        ids=str,
    )
    def test_a_file_that_is_no_status_is_one_line(self, change: Any, tmp_path: Path) -> None:
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        status().save(path)
        content = "[" * 100_000 if change is None else json.loads(path.read_text()) | change
        path.write_text(content if change is None else json.dumps(content))
        with pytest.raises(CmaeError) as refused:
            read_status(tmp_path)
        message = str(refused.value)
        assert message.isprintable()
        assert message.startswith(str(path))

    def test_a_folder_without_a_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"name the folder \(run\.out\)"):
            read_status(tmp_path)


class TestCondition:
    def test_a_rank_that_writes_is_running(self) -> None:
        assert condition(status(), NOW) == "running"

    def test_silence_is_no_death(self) -> None:
        assert condition(status(time=NOW - 14), NOW) == "running"
        assert condition(status(time=NOW - 16), NOW) == "silent"
        assert condition(status(time=NOW - 601), NOW) == "lost"

    def test_a_process_that_is_seen_is_not_lost(self) -> None:
        here = {"process_space": process_space(), "process_start": process_start(os.getpid())}
        assert condition(status(time=NOW - 9999, **here), NOW) == "silent"

    def test_a_process_that_is_gone_is_dead_at_once(self) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        gone = status(pid=process.pid, process_space=process_space(), process_start=1)
        assert condition(gone, NOW) == "dead"

    def test_a_number_that_another_process_has_now_is_a_dead_run(self) -> None:
        start = process_start(os.getpid())
        assert start is not None
        mine = status(process_space=process_space(), process_start=start)
        assert condition(mine, NOW) == "running"
        assert condition(replace(mine, process_start=start - 1), NOW) == "dead"

    def test_a_process_that_nobody_has_waited_for_is_dead(self) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        start = process_start(process.pid) or 0
        try:
            wait_for(lambda: process_start(process.pid) == 0)
            assert process_is_gone(process.pid, start)
        finally:
            process.wait()

    def test_numbers_of_another_container_are_not_looked_for_here(self) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        boot = process_space().split()[0]
        elsewhere = status(host=socket.gethostname(), pid=process.pid)
        for space in ("", f"{boot} pid:[1]", f"another-boot {process_space().split()[1]}"):
            found = condition(replace(elsewhere, process_space=space), NOW)
            assert found == "running"

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
        lost = [world[0], replace(world[1], time=NOW - 3700)]
        assert verdict(lost, NOW).startswith("No news of rank 1 (node-a")
        assert "1:01:40" in verdict(lost, NOW)
        here = {"process_space": process_space(), "process_start": 1}
        dead = [world[0], replace(world[1], **here)]
        assert verdict(dead, NOW).startswith("Dead: rank 1 (node-a")
        failed = [world[0], replace(world[1], state="failed", error="ValueError: x")]
        assert verdict(failed, NOW) == "Failed: rank 1: ValueError: x"
        done = [replace(one, state="finished") for one in world]
        assert verdict(done, NOW).startswith("The run has finished")
        stuck = [world[0], replace(world[1], step_age_s=99.0)]
        assert verdict(stuck, NOW) == "Stuck: rank 1 has done no step for 99 s."

    @pytest.mark.parametrize(
        "changes", [{"step_ms": 0.0}, {"total_steps": 0}, {"step_age_s": -5.0}]
    )
    def test_numbers_that_no_run_has_are_drawn_all_the_same(self, changes: dict[str, Any]) -> None:
        assert "node-a" in drawn([status(**changes)])

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
    def test_one_frame_for_a_log(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(top_module, "time", Clock(NOW))
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        status().save(path)
        assert top(tmp_path, once=True) == 0
        assert "Bound by" in capsys.readouterr().out
        status(state="failed", error="no more").save(path)
        assert top(tmp_path, once=True) == 1
        assert "Failed: rank 0: no more" in capsys.readouterr().out

    @pytest.mark.parametrize("shift_s", [-3600.0, 3600.0], ids=["set back", "ahead"])
    def test_a_clock_that_differs_is_seen_through(
        self, shift_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The run's files are dated an hour off, and go on changing while they are watched."""
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        clock = Clock(NOW, on_sleep=lambda now: status(time=now + shift_s).save(path))
        monkeypatch.setattr(top_module, "time", clock)
        clock.sleep(0)
        assert condition(read_status(tmp_path)[0], NOW) == ("lost" if shift_s < 0 else "running")
        (heard,) = top_module._News(tmp_path).listen()
        assert condition(heard, clock.time()) == "running"
        assert abs(heard.time - clock.time()) < 1

    def test_an_old_file_that_does_not_change_is_told_as_it_is(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        monkeypatch.setattr(top_module, "time", Clock(NOW))
        status(time=NOW - 40).save(path)
        assert top(tmp_path, once=True) == 0
        assert "No news of rank 0 (node-a, process" in capsys.readouterr().out
        status(time=NOW - 4000).save(path)
        assert top(tmp_path, once=True) == 1
        assert "for 1:0" in capsys.readouterr().out

    def test_storage_that_does_not_answer_is_silence_and_no_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        status_folder(tmp_path).mkdir()
        path = status_folder(tmp_path) / "rank-0000.json"
        status().save(path)
        news = top_module._News(tmp_path)
        first = news.read()
        path.write_text("{}")
        assert news.read() == first

    def test_it_starts_without_torch(self) -> None:
        found = (
            "import sys, cmae.train.commands.look.top; print({'torch', 'scipy'} & set(sys.modules))"
        )
        printed = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
        assert printed.stdout.strip() == "set()"
