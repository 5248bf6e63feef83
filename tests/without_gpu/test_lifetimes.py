"""Memory that goes from stream to stream, on the CUDA stub: nothing is read or given back too early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.cuda_stub import run_on_stub
from support.stub_trace import Trace, read_trace

MAIN = "(nil)"


def run(scenario: str, path: Path, fault: str = "") -> tuple[dict[str, Any], Trace]:
    trace = path / "trace"
    result = run_on_stub("stub_lifetimes", scenario, fault, trace=trace, lags=True)
    return result, read_trace(trace)


def unordered_reads(trace: Trace, loader_stream: str) -> list[int]:
    """Batches that the training stream reads without being ordered after all work that made them."""
    made: dict[int, int] = {}
    for work in trace.work:
        if work.stream == loader_stream:
            made[_number(work.marks, "make")] = work.number
    return [
        batch
        for work in trace.work
        if work.stream == MAIN and work.kind == "launch" and _number(work.marks, "read") >= 0
        for batch in [_number(work.marks, "read")]
        if work.after.get(loader_stream, 0) < made[batch]
    ]


def _number(marks: tuple[str, ...], word: str) -> int:
    return max((int(mark.split()[1]) for mark in marks if mark.split()[0] == word), default=-1)


def test_batches_come_in_order_stay_while_they_are_read_and_never_wait(tmp_path: Path) -> None:
    result, trace = run("loader", tmp_path)
    stream = f"{result['stream']:#x}"
    assert sum(work.stream == stream for work in trace.work) >= 6 * 6
    assert unordered_reads(trace, stream) == []
    assert result["reused"] == []
    assert trace.pageable == []
    making = [wait for wait, marks in trace.host_waits if any(m.startswith("make") for m in marks)]
    assert making == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no record_stream", "no wait_event", "pageable upload"])
def test_the_checks_find_each_broken_rule(fault: str, tmp_path: Path) -> None:
    result, trace = run("loader", tmp_path, fault)
    found = {
        "no record_stream": bool(result["reused"]),
        "no wait_event": bool(unordered_reads(trace, f"{result['stream']:#x}")),
        "pageable upload": bool(trace.pageable),
    }
    assert found[fault]


def test_dalis_buffers_stay_until_the_copies_out_of_them_have_passed(tmp_path: Path) -> None:
    result, _ = run("dali", tmp_path)
    assert result == {"alive": [2, 4, 6], "after": 0}
    broken, _ = run("dali", tmp_path, "dropped at once")
    assert broken["alive"] == [0, 0, 0]


def test_the_step_asks_for_its_flag_without_waiting_and_waits_once(tmp_path: Path) -> None:
    _, trace = run("step", tmp_path)
    waits = [(kind, marks[-1]) for kind, marks in trace.host_waits if marks]
    assert waits == [("event", "flag asked")]


def test_a_snapshot_travels_after_its_copy_and_beside_the_training(tmp_path: Path) -> None:
    _, trace = run("checkpoint", tmp_path)
    (moved,) = [
        work
        for work in trace.work
        if work.kind == "copy" and any("moving" in m for m in work.marks)
    ]
    assert moved.stream != MAIN
    last = max(
        w.number for w in trace.work if w.stream == MAIN and not any("moving" in m for m in w.marks)
    )
    assert moved.after.get(MAIN, 0) >= last


def test_the_profilers_batches_stay_while_they_are_read(tmp_path: Path) -> None:
    result, trace = run("profiler", tmp_path)
    assert result["reused"] == []
    assert trace.pageable == []
