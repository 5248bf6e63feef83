"""How the threads of the loader's stages spend their time: shares from its counters, and a table of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.table import Table
from rich.text import Text

from cmae.pipeline.stage_stats import Histogram, LoaderSnapshot, StageSnapshot
from cmae.train.profiling.analysis.records import Phase, Profile

WHAT = {
    "read": "bytes from storage",
    "decode_augment": "decode, crop, colour",
    "prefetch": "masks, copy to the device",
    "queue": "ready batches in front of the training thread",
}
"""Each stage of the loader, for a reader who has not seen its code."""

NARROW = 116
"""Columns of a terminal below which notes are left out and bars are shorter."""

_BAR_WIDTH = 28
_STAGE_BAR = {"busy": ("█", "blue"), "starved": ("░", "yellow"), "blocked": ("▒", "magenta")}


@dataclass(frozen=True)
class StageShares:
    """One stage over a window: shares of its threads' time, and rates.

    What is missing to 1 was spent elsewhere: the thread that takes batches is in the training step.
    """

    stage: StageSnapshot
    busy: float
    starved: float
    """Waiting for input."""
    blocked: float
    """Waiting for room downstream."""
    images_per_s: float
    mb_per_s: float

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.stage.name

    @property
    def capacity_images_per_s(self) -> float:
        """What the stage would do if its threads were always busy; nan where nothing was done."""
        return self.images_per_s / self.busy if self.busy > 0 else float("nan")


def stage_shares(window: LoaderSnapshot) -> list[StageShares]:
    """Every stage of a window, in the order of the flow."""
    return [_shares(stage, window.time_s) for stage in window.stages.values()]


def _shares(stage: StageSnapshot, time_s: float) -> StageShares:
    available = max(stage.threads * time_s, 1e-9)
    return StageShares(
        stage,
        busy=stage.busy_s / available,
        starved=stage.starved_s / available,
        blocked=stage.blocked_s / available,
        images_per_s=stage.items / max(time_s, 1e-9),
        mb_per_s=stage.bytes / 1e6 / max(time_s, 1e-9),
    )


def sum_windows(windows: Sequence[LoaderSnapshot], *, side_by_side: bool = False) -> LoaderSnapshot:
    """Several windows as one: items and seconds of work add up.

    Args:
        windows: Windows of one loader, one after the other.
        side_by_side: Whether they are of several loaders at the same time, as those of the ranks are: threads
            add up then, and time is not counted twice.
    """
    times = [one.time_s for one in windows]
    combine = statistics.fmean if side_by_side else math.fsum
    names = dict.fromkeys(name for one in windows for name in one.stages)
    return LoaderSnapshot(
        time_s=combine(times),
        stages={
            name: _sum_stages(
                [one.stages[name] for one in windows if name in one.stages], side_by_side
            )
            for name in names
        },
        batches=sum(one.batches for one in windows),
        samples=sum(one.samples for one in windows),
        wait_s=combine([one.wait_s for one in windows]),
        queue_depth_mean=_weighted_mean([one.queue_depth_mean for one in windows], times),
        bad_samples=sum(one.bad_samples for one in windows),
    )


def _sum_stages(stages: Sequence[StageSnapshot], side_by_side: bool) -> StageSnapshot:
    counted = {
        field.name: sum(getattr(one, field.name) for one in stages)
        for field in fields(StageSnapshot)
        if field.name not in ("name", "threads", "histogram")
    }
    return StageSnapshot(
        name=stages[0].name,
        threads=sum(one.threads for one in stages) if side_by_side else stages[0].threads,
        histogram=sum((one.histogram for one in stages), start=Histogram()),
        **counted,
    )


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def loader_phase(profile: Profile) -> Phase | None:
    """The phase whose loader a report shows: the full run, else the last one that ran a loader."""
    with_loader = [phase for phase in profile.phases if phase.loader is not None]
    full = [phase for phase in with_loader if phase.name == "full"]
    return next(iter(full + with_loader[::-1]), None)


def loader_window(phase: Phase) -> LoaderSnapshot:
    """The counters of a phase that ran a loader."""
    if phase.loader is None:
        raise ValueError(f"phase {phase.name!r} ran no loader")
    return LoaderSnapshot.from_dict(phase.loader)


def stage_table(stages: Sequence[StageShares], title: str, width: int) -> Table:
    """Stages of a loader with their threads' time: busy, starved, blocked.

    Args:
        stages: Stages in the order of the flow.
        title: Title above the table.
        width: Columns of the terminal.
    """
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    is_wide = width >= NARROW
    table.add_column("stage", no_wrap=True)
    if is_wide:
        table.add_column("threads' time", width=_BAR_WIDTH, no_wrap=True)
    for name, (block, colour) in _STAGE_BAR.items():
        header = Text.assemble((block, colour), f" {name}")
        table.add_column(header, justify="right", no_wrap=True)
    rate = "images/s" if is_wide else "images\n/s"
    for name in ("threads", rate, *["MB/s"][:is_wide], "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for stage in stages:
        table.add_row(
            stage.name,
            *[stage_bar(stage, _BAR_WIDTH)][:is_wide],
            *(f"{getattr(stage, name):.0%}" for name in _STAGE_BAR),
            str(stage.stage.threads),
            format_number(stage.images_per_s),
            *[format_number(stage.mb_per_s)][:is_wide],
            *(format_number(stage.stage.percentile_ms(q)) for q in (50, 99)),
        )
    what = (f"{stage.name}: {WHAT[stage.name]}" for stage in stages if stage.name in WHAT)
    table.caption, table.caption_justify = "; ".join(what), "left"
    return table


def stage_bar(stage: StageShares, width: int) -> Text:
    """Busy, starved and blocked shares of a stage as blocks."""
    bar, done, share = Text(), 0, 0.0
    for name, (block, colour) in _STAGE_BAR.items():
        share += getattr(stage, name)
        end = min(round(share * width), width)
        bar.append(block * (end - done), colour)
        done = end
    return bar


def format_number(value: float) -> str:
    """Three significant digits, thousands separated; '-' for what is not there."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 if value == 0 else max(0, min(3, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"
