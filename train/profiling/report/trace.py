"""A profile as a Chrome trace, for https://ui.perfetto.dev or chrome://tracing.

The file follows the Trace Event Format: complete events ("X", with `ts` and `dur` in microseconds) and
metadata ("M") that names the tracks. What is one event and what is a sum:

- every step of every phase is one event, laid end to end in the order they ran;
- the stages of a phase's loader are sums: busy, starved and blocked time of the average thread;
- the account is the mean step, its parts laid end to end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmae.train.profiling.analysis.records import Phase, Profile
from cmae.train.profiling.analysis.stages import StageShares, loader_window, stage_shares
from cmae.train.profiling.report.terminal import part_label, waterfall

Event = dict[str, Any]
_ACCOUNT = 1
"""Process number of the account; the phases come after it."""


def write_trace(profile: Profile, path: Path) -> None:
    """Write the trace as JSON; the phases are its processes, steps and stages their threads."""
    events = list(_account_events(profile))
    for number, phase in enumerate(profile.phases, start=_ACCOUNT + 1):
        events += _phase_events(phase, number)
    content = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"created": profile.created, "verdict": profile.verdict.sentence},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _account_events(profile: Profile) -> Iterator[Event]:
    yield from _names(_ACCOUNT, "account of the mean step", {1: "step", 2: "parts"})
    yield _complete("step", _ACCOUNT, 1, start_ms=0.0, ms=profile.step_ms.value)
    for part, start in waterfall(profile.parts):
        if part.ms.value > 0:  # a negative residual has no length to draw
            facts = {"ms": part.ms.value, "low": part.ms.low, "high": part.ms.high}
            arguments = {**facts, "note": part.note}
            label = part_label(part.name)
            yield _complete(label, _ACCOUNT, 2, start_ms=start, ms=part.ms.value, args=arguments)


def _phase_events(phase: Phase, process: int) -> Iterator[Event]:
    stages = [] if phase.loader is None else stage_shares(loader_window(phase))
    threads = {number: f"stage {stage.name}" for number, stage in enumerate(stages, start=2)}
    yield from _names(process, f"{phase.name}: {phase.what}", {1: "steps"} | threads)
    start = 0.0
    for number, ms in enumerate(phase.step_times_ms):
        yield _complete("step", process, 1, start_ms=start, ms=ms, args={"number": number})
        start += ms
    for number, stage in enumerate(stages, start=2):
        yield from _stage_events(stage, process, number, 1000 * loader_window(phase).time_s)


def _stage_events(stage: StageShares, process: int, thread: int, ms: float) -> Iterator[Event]:
    start = 0.0
    for name in ("busy", "starved", "blocked"):
        share = max(0.0, min(getattr(stage, name), 1.0))
        arguments = {"share": share, "threads": stage.stage.threads, "images": stage.stage.items}
        if share:
            yield _complete(name, process, thread, start_ms=start, ms=share * ms, args=arguments)
        start += share * ms


def _names(process: int, name: str, threads: dict[int, str]) -> Iterator[Event]:
    yield _metadata("process_name", process, 0, {"name": name})
    yield _metadata("process_sort_index", process, 0, {"sort_index": process})
    for thread, label in threads.items():
        yield _metadata("thread_name", process, thread, {"name": label})
        yield _metadata("thread_sort_index", process, thread, {"sort_index": thread})


def _metadata(kind: str, process: int, thread: int, arguments: dict[str, Any]) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "ts": 0, "args": arguments}


def _complete(
    name: str,
    process: int,
    thread: int,
    *,
    start_ms: float,
    ms: float,
    args: dict[str, Any] | None = None,
) -> Event:
    """A span; its ends are whole nanoseconds, so that spans end to end neither overlap nor gape."""
    start, end = round(1e6 * start_ms), round(1e6 * (start_ms + ms))
    times = {"ts": start / 1000, "dur": (end - start) / 1000}
    return {"name": name, "ph": "X", "pid": process, "tid": thread, **times, "args": args or {}}
