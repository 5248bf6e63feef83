"""Two profiles beside each other: which differences are larger than the measurements' own scatter?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cmae.train.monitor.console import PlainConsole, labelled
from cmae.train.profiling.analysis.records import Estimate, Phase, Profile
from cmae.train.profiling.analysis.stages import (
    StageShares,
    format_number,
    loader_phase,
    loader_window,
    stage_shares,
)
from cmae.train.profiling.report.terminal import (
    flatten,
    format_interval,
    format_value,
    label,
)


@dataclass(frozen=True)
class Difference:
    """One quantity in both profiles; None where a profile does not have it."""

    name: str
    unit: str
    before: Estimate | None
    after: Estimate | None

    @property
    def change(self) -> Estimate | None:
        """After less before, with a 95 % interval; None unless both are there.

        The interval is MOVER's (Zou and Donner 2008): from the two intervals alone, which need not be
        symmetric. The profiles are taken to be independent.
        """
        if self.before is None or self.after is None:
            return None
        old, new = self.before, self.after
        value = new.value - old.value
        below = math.hypot(new.value - new.low, old.high - old.value)
        above = math.hypot(new.high - new.value, old.value - old.low)
        return Estimate(value, value - below, value + above, min(old.n, new.n))

    @property
    def is_significant(self) -> bool:
        """Whether the interval of the change leaves out zero; True for what only one profile has."""
        change = self.change
        return change is None or not change.low <= 0 <= change.high


@dataclass(frozen=True)
class ProfileDiff:
    """Everything in which two profiles may differ."""

    before: Profile
    after: Profile
    step: Difference
    breakdown: tuple[Difference, ...]
    stages: tuple[Difference, ...]
    """Busy milliseconds of a thread for 1000 images, by stage."""
    operations: tuple[Difference, ...]
    """CPU milliseconds of an image, by operation."""
    shares: tuple[tuple[str, StageShares | None, StageShares | None], ...]
    settings: tuple[tuple[str, Any, Any], ...]
    """Settings and facts of the machine that are not equal."""


def diff_profiles(before: Profile, after: Profile) -> ProfileDiff:
    """Compare two profiles, component by component and stage by stage.

    Args:
        before: Older profile, or the one to compare with.
        after: Newer profile.
    """
    both = (before, after)
    components = [{each.name: each.ms for each in one.breakdown} for one in both]
    operations = [{cost.name: cost.cpu_ms for cost in one.operations} for one in both]
    shares = tuple(_shares(before, after))
    return ProfileDiff(
        before,
        after,
        step=Difference("step", "ms", before.step_ms, after.step_ms),
        breakdown=tuple(_differences(*components)),
        operations=tuple(_differences(*operations)),
        stages=tuple(_stage_differences(before, after, shares)),
        shares=shares,
        settings=tuple(_settings(before, after)),
    )


def _differences(old: Mapping[str, Estimate], new: Mapping[str, Estimate]) -> Iterator[Difference]:
    for name in dict.fromkeys([*old, *new]):
        yield Difference(name, "ms", old.get(name), new.get(name))


def _shares(
    before: Profile, after: Profile
) -> Iterator[tuple[str, StageShares | None, StageShares | None]]:
    old, new = _by_name(loader_phase(before)), _by_name(loader_phase(after))
    for name in dict.fromkeys([*old, *new]):
        yield name, old.get(name), new.get(name)


def _by_name(phase: Phase | None) -> dict[str, StageShares]:
    if phase is None:
        return {}
    return {stage.name: stage for stage in stage_shares(loader_window(phase))}


def _stage_differences(
    before: Profile,
    after: Profile,
    shares: tuple[tuple[str, StageShares | None, StageShares | None], ...],
) -> Iterator[Difference]:
    for name, old, new in shares:
        row = Difference(name, "ms per 1000 images", _busy(before, old), _busy(after, new))
        if row.before or row.after:
            yield row


def _busy(profile: Profile, stage: StageShares | None) -> Estimate | None:
    """Thread time for 1000 images.

    A stage is counted once over a whole phase: it has no repetitions of its own. Its relative interval is
    taken to be that of the phase's step, which holds the same drift of the machine.
    """
    phase = loader_phase(profile)
    if stage is None or phase is None or not stage.stage.items or not stage.stage.busy_s:
        return None
    value = 1e6 * stage.stage.busy_s / stage.stage.items
    step = phase.step_ms
    return Estimate(value, value * step.low / step.value, value * step.high / step.value, n=step.n)


def _settings(before: Profile, after: Profile) -> Iterator[tuple[str, Any, Any]]:
    old, new = _facts(before), _facts(after)
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _facts(profile: Profile) -> dict[str, Any]:
    sizes = {"global_batch_size": profile.global_batch_size, "world_size": profile.world_size}
    return flatten(profile.config) | flatten(profile.machine, "machine.") | sizes


def print_diff(diff: ProfileDiff, console: PlainConsole) -> None:
    """Print the diagnosis then and now, and every difference with its interval."""
    for when, profile in (("then", diff.before), ("now", diff.after)):
        console.print(labelled(when, f"({profile.created}): {profile.diagnosis.sentence}", "bold"))
    console.print(_table("Breakdown of the step, ms", (*diff.breakdown, diff.step)))
    if diff.stages:
        console.print(_table("Busy thread time of 1000 images, ms", diff.stages))
    if diff.operations:
        console.print(_table("CPU time of an image by operation, ms", diff.operations))
    if diff.settings:
        table = Table(title="\nWhat else differs", title_justify="left", title_style="bold")
        for name in ("", "then", "now"):
            table.add_column(name, overflow="fold")
        for name, old, new in diff.settings:
            table.add_row(name, format_value(old), format_value(new))
        console.print(table)
    console.print(CAUTION, style="dim", soft_wrap=True)


CAUTION = (
    "A change is called significant when its 95 % interval leaves out zero: of twenty quantities that did "
    "not change, one is expected to look as if it had."
)


def _table(title: str, differences: tuple[Difference, ...]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("then", "now", "change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in differences:
        change = row.change
        table.add_row(
            label(row.name),
            *(format_number(one.value) if one else "-" for one in (row.before, row.after)),
            f"{change.value:+.3g}" if change else "-",
            format_interval(change) if change else "-",
            describe_change(row),
            style="bold" if row.is_significant else "dim",
        )
    return table


def describe_change(row: Difference) -> str:
    """The finding in a word or two: 'faster', 'slower', 'within noise', 'only then', 'only now'."""
    change = row.change
    if change is None:
        return "only then" if row.after is None else "only now"
    if not row.is_significant:
        return "within noise"
    return "faster" if change.value < 0 else "slower"
