"""`cmae top`: a running job's ranks and loader stages, like a system monitor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cmae.errors import CmaeError, require
from cmae.printable import printable
from cmae.train.machine import process_is_gone, process_space
from cmae.train.monitor.console import PlainConsole
from cmae.train.monitor.status import EVERY_S, RunStatus, format_duration, read_status
from cmae.train.profiling.analysis.stages import (
    StageShares,
    format_number,
    stage_bar,
    stage_shares,
    stage_table,
    sum_windows,
)
from cmae.train.profiling.analysis.verdict import NAMES, SMALL

_SILENT_S = 15.0
"""Without news for this long, in spite of the thread that writes them, a rank is 'silent'."""
_LOST_S = 600.0
"""Without news for this long it is 'lost', unless its process is seen to be there."""
_LISTEN_S = 3 * EVERY_S
"""How long a file that looks old is watched before it is believed: the clocks of two machines may differ."""
_UNEVEN = 0.05
"""Share of the step by which a rank's waiting must exceed the others' for it to be called a straggler."""
_MAX_RANKS = 32
_BOTTLENECKS = {
    "read": NAMES["storage"],
    "decode_augment": NAMES["decode_augment"],
    "prefetch": NAMES["prefetch"],
}
"""What `cmae profile` calls each stage of the loader when it limits the run."""
_COLOURS = {"running": "green", "stuck": "yellow", "finished": "green", "stopped": "yellow"}


def top(run: Path, *, once: bool = False, every_s: float = EVERY_S) -> int:
    """Show a run's ranks: rates, where they wait, their loaders' stages.

    It reads the small files that each rank writes into the run's folder, so it works from any machine that
    sees the folder. Exits with 1 if the run failed, its processes are gone, or there has been no news of it
    for ten minutes; with 0 if it goes on or is done.

    Args:
        run: folder of the run (run.out).
        once: print one frame and exit, for logs.
        every_s: seconds between two frames.
    """
    require(0.1 <= every_s <= 3600, "--every_s", every_s, "between 0.1 and 3600 seconds")
    console = PlainConsole()
    news = _News(run)
    statuses = news.listen()
    if once or not console.is_terminal:
        console.print(frame(run, statuses, now=time.time(), width=console.width))
        return _exit_code(statuses)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            shown = frame(run, statuses, now=time.time(), width=console.width)
            live.update(shown, refresh=True)
            if not any(_is_going(one, time.time()) for one in statuses):
                return _exit_code(statuses)
            time.sleep(every_s)
            statuses = news.read()


class _News:
    """The statuses of a run, each dated by this machine's clock as soon as its file is seen to change.

    The run's own clock may be another machine's, or may be set back while it goes.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._heard: dict[int, tuple[float, float]] = {}
        self._statuses: list[RunStatus] = []

    def listen(self) -> list[RunStatus]:
        """Read all; where files look old, or younger than now, see whether they change."""
        statuses = self.read()
        doubted = {one.rank for one in statuses if _is_doubtful(one, self._heard[one.rank][0])}
        written = {rank: self._heard[rank][0] for rank in doubted}
        end = time.time() + _LISTEN_S
        while doubted and time.time() < end:
            time.sleep(0.2)
            statuses = self.read()
            doubted = {rank for rank in doubted if self._heard[rank][0] == written[rank]}
        return statuses

    def read(self) -> list[RunStatus]:
        """The statuses now; those of before where the storage does not answer."""
        try:
            found = read_status(self._run)
        except (OSError, CmaeError):
            if not self._statuses:
                raise
            return self._statuses
        self._statuses = [self._dated(one, time.time()) for one in found]
        return self._statuses

    def _dated(self, status: RunStatus, now: float) -> RunStatus:
        written, heard = self._heard.get(status.rank, (status.time, min(status.time, now)))
        if status.time != written:
            heard = now
        self._heard[status.rank] = (status.time, heard)
        return replace(status, time=heard)


def _is_doubtful(status: RunStatus, written: float) -> bool:
    """Whether the age of a file says nothing yet."""
    now = time.time()
    return condition(status, now) in ("silent", "lost") or (
        status.state == "running" and written > now + 1
    )


def _exit_code(statuses: Sequence[RunStatus]) -> int:
    conditions = [condition(one, time.time()) for one in statuses]
    return int(any(found in ("failed", "dead", "lost") for found in conditions))


def _is_going(status: RunStatus, now: float) -> bool:
    return condition(status, now) in ("running", "stuck", "silent")


def condition(status: RunStatus, now: float) -> str:
    """running, stuck, silent, lost, dead, finished, stopped or failed.

    'stuck': the process writes, but its step takes ten times as long as the ones before. 'silent': no news
    for 15 s, which storage that hangs or a full disk can cause, too. 'lost': no news for ten minutes. 'dead':
    it ran on this machine, among the process numbers that are seen here, and the process is gone.
    """
    if status.state != "running":
        return status.state
    is_seen = _is_seen_here(status)
    if is_seen and process_is_gone(status.pid, status.process_start):
        return "dead"
    silence_s = now - status.time
    if silence_s > _SILENT_S:
        return "silent" if is_seen or silence_s <= _LOST_S else "lost"
    limit_s = max(10 * (status.step_ms or 0) / 1000, 30.0)
    return "stuck" if status.step_ms and status.step_age_s > limit_s else "running"


def _is_seen_here(status: RunStatus) -> bool:
    return status.process_space != "" and status.process_space == process_space()


def frame(run: Path, statuses: Sequence[RunStatus], *, now: float, width: int) -> RenderableType:
    """One frame of the display.

    Args:
        run: its folder, for the title.
        statuses: Status of every rank.
        now: Unix time.
        width: columns of the terminal.
    """
    shown = [one for one in statuses if _is_going(one, now)] or statuses
    stages = stage_shares(sum_windows([one.window for one in shown], side_by_side=True))
    lines = [_headline(run, statuses, now), Text(verdict(statuses, now), style="bold")]
    lines += [Text(line, style="yellow") for line in stragglers(statuses, now)]
    return Group(
        *lines,
        _rank_table(statuses, now, width),
        stage_table(
            stages, "Stages" if len(shown) == 1 else f"Stages of {len(shown)} ranks", width
        ),
    )


def _headline(run: Path, statuses: Sequence[RunStatus], now: float) -> Text:
    step, total = min(one.step for one in statuses), statuses[0].total_steps
    parts = [printable(str(run)), f"step {step}/{total} ({step / max(total, 1):.0%})"]
    rates = [one.images_per_s for one in statuses if one.images_per_s]
    if rates:
        rate = statistics.median(rates)
        parts.append(f"{format_number(rate)} images/s")
        seconds = (total - step) * statuses[0].global_batch_size / rate
        if any(_is_going(one, now) for one in statuses):
            parts.append(f"ETA {format_duration(seconds)}")
    losses = [one.loss for one in statuses if one.loss is not None]
    if losses:
        parts.append(f"loss {losses[0]:.4f}")
    return Text("  ".join(parts))


def verdict(statuses: Sequence[RunStatus], now: float) -> str:
    """Where the run's time goes, in one sentence; first of all whether it goes on."""
    conditions = {one.rank: condition(one, now) for one in statuses}
    missing = (rank for rank in range(statuses[0].world_size) if rank not in conditions)
    if first := list(islice(missing, 9)):
        return f"{_ranks(first)} has written nothing yet."
    for ended in ("failed", "dead", "lost", "silent"):
        ranks = [rank for rank, found in conditions.items() if found == ended]
        if ranks:
            return _ended(ended, [one for one in statuses if one.rank in ranks], now)
    if not any(found in ("running", "stuck") for found in conditions.values()):
        return f"The run has {statuses[0].state}, {_ago(statuses[0], now)} ago."
    stuck = [one for one in statuses if conditions[one.rank] == "stuck"]
    if stuck:
        age = max(one.step_age_s for one in stuck)
        return f"Stuck: {_ranks([one.rank for one in stuck])} has done no step for {age:.0f} s."
    if all(one.step_ms is None for one in statuses):
        return f"Starting: no step measured yet ({max(one.step_age_s for one in statuses):.0f} s)."
    return _limit(statuses)


def _ended(how: str, statuses: Sequence[RunStatus], now: float) -> str:
    ranks, one = _ranks([status.rank for status in statuses]), statuses[0]
    where = f"{ranks} ({one.host}, process {one.pid})"
    if how == "failed":
        return f"Failed: {ranks}: {one.error}"
    if how == "dead":
        return f"Dead: {where} was running and its process is gone."
    if _is_seen_here(one):
        why = "its process is there, and its status file cannot be written or read"
    else:
        why = "whether its process goes on is seen on its machine only"
    return f"No news of {where} for {_ago(one, now)}: {why}."


def _ago(status: RunStatus, now: float) -> str:
    return format_duration(max(now - status.time, 0.0))


def _limit(statuses: Sequence[RunStatus]) -> str:
    """The verdict on a run that goes: the model, or the stage of the loader that it waits for."""
    window = sum_windows([one.window for one in statuses], side_by_side=True)
    worst = max(statuses, key=lambda one: one.wait_share)
    stages = [stage for stage in stage_shares(window) if stage.name in _BOTTLENECKS]
    if worst.wait_share < SMALL:
        headroom = min(
            (one.capacity_images_per_s / one.images_per_s for one in stages if one.images_per_s),
            default=float("nan"),
        )
        return (
            f"The model is the bottleneck; the loader has {headroom:.1f}x head-room "
            f"({worst.wait_share:.0%} of the step is waiting for data)."
        )
    stages = [
        stage
        for stage in stage_shares(worst.window)
        if stage.name in _BOTTLENECKS and stage.busy > 0
    ]
    if not stages:
        return (
            f"Waiting for data {worst.wait_share:.0%} of the step; no stage of the loader is busy."
        )
    busiest = max(stages, key=lambda stage: stage.busy)
    return (
        f"Bound by {_BOTTLENECKS[busiest.name]} ({busiest.stage.threads} threads, {busiest.busy:.0%} busy): "
        f"{worst.wait_share:.0%} of the step is waiting for data."
    )


def stragglers(statuses: Sequence[RunStatus], now: float) -> Iterator[str]:
    """Ranks that the others wait for, one line each.

    Every rank's step takes equally long, for they meet in the gradient's all-reduce. What tells a slow rank
    is its own waiting for data (over 5 % of the step more than the median), a lower clock of its GPU (by 10 %
    or more), or that it is behind.
    """
    going = [one for one in statuses if _is_going(one, now) and one.step_ms]
    if len(going) < 2:
        return
    waits = {one.rank: one.wait_share for one in going}
    median_wait = statistics.median(waits.values())
    clocks = [one.gpu["sm_clock_mhz"] for one in going if "sm_clock_mhz" in one.gpu]
    for one in going:
        reasons = []
        if waits[one.rank] > median_wait + _UNEVEN:
            reasons.append(
                f"waits for data {waits[one.rank]:.0%} of the step, the others {median_wait:.0%}"
            )
        clock = one.gpu.get("sm_clock_mhz")
        if clock is not None and clock < 0.9 * statistics.median(clocks):
            reasons.append(f"GPU at {clock:.0f} MHz, the others {statistics.median(clocks):.0f}")
        if condition(one, now) == "stuck":
            reasons.append(f"no step for {one.step_age_s:.0f} s")
        if reasons:
            yield f"straggler: rank {one.rank} ({one.host}): {'; '.join(reasons)}"


def _rank_table(statuses: Sequence[RunStatus], now: float, width: int) -> Table:
    bar_width = max(4, min(14, (width - 78) // 3))
    table = Table(title="\nRanks", title_justify="left", title_style="bold")
    for name in ("rank", "host", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "ms", "wait", "queue"):
        table.add_column(name, justify="right", no_wrap=True)
    names = [name for name in statuses[0].window.stages if name in _BOTTLENECKS]
    for name in names:
        table.add_column(name, width=bar_width, no_wrap=True)
    has_gpu = any(one.gpu for one in statuses)
    if has_gpu:
        table.add_column("GPU", justify="right", no_wrap=True)
    shown = sorted(statuses, key=lambda one: one.wait_share, reverse=True)[:_MAX_RANKS]
    for one in sorted(shown, key=lambda one: one.rank):
        found = condition(one, now)
        shares = {stage.name: stage for stage in stage_shares(one.window)}
        table.add_row(
            str(one.rank),
            Text(one.host[:18]),
            Text(
                "no news" if found in ("silent", "lost") else found,
                style=_COLOURS.get(found, "bold red"),
            ),
            str(one.step),
            "-" if one.step_ms is None else format_number(one.step_ms),
            f"{one.wait_share:.0%}",
            f"{one.window.queue_depth_mean:.1f}",
            *(_bar(shares.get(name), bar_width) for name in names),
            *[_gpu(one)][:has_gpu],
        )
    if len(statuses) > _MAX_RANKS:
        table.caption = f"the {_MAX_RANKS} of {len(statuses)} ranks that wait longest"
    return table


def _bar(stage: StageShares | None, width: int) -> Text:
    return Text("-") if stage is None else stage_bar(stage, width)


def _gpu(status: RunStatus) -> str:
    gpu = status.gpu
    cells = [f"SM {gpu['sm_pct']:.0f}%"] if "sm_pct" in gpu else []
    cells += [f"JPEG {gpu['jpeg_pct']:.0f}%"] if gpu.get("jpeg_pct") else []
    cells += [f"{gpu['sm_clock_mhz']:.0f} MHz"] if "sm_clock_mhz" in gpu else []
    return " ".join(cells) or "-"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:8]))
    return f"each of ranks {listed}{' and others' if len(ranks) > 8 else ''}"
