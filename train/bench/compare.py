"""Has something become slower? Two result files of one benchmark, row by row.

    cmae bench compare OLD.json NEW.json

A measurement has changed when the two ranges (smallest to largest round) do not overlap; it is a regression
when, moreover, its median is worse by more than --threshold. Rates, ratios and TFLOP/s should grow; seconds,
bytes and memory should shrink. Results of two devices (unless --any_device is given), two benchmarks or two
configurations do not compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cmae.errors import CmaeError
from cmae.train.bench.tables import Result
from cmae.train.monitor.console import PlainConsole

_GROWS = ("images_per_s", "samples_per_s", "ratio", "tflops", "psnr", "bandwidth")
"""A measurement whose name holds one of these should be large; any other should be small."""


class NotComparableError(ValueError):
    """The files do not answer one question; the message names the difference."""


@dataclass(frozen=True)
class Change:
    """One measurement of one row in both files; None where a file lacks it."""

    row: str
    measurement: str
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None

    @property
    def ratio(self) -> float:
        """Median after over median before; nan where one is absent or zero."""
        if self.before is None or self.after is None or not self.before["median"]:
            return float("nan")
        return self.after["median"] / self.before["median"]

    @property
    def is_noise(self) -> bool:
        """Whether the ranges of the rounds overlap."""
        if self.before is None or self.after is None:
            return False
        return self.after["min"] <= self.before["max"] and self.before["min"] <= self.after["max"]

    @property
    def slowdown(self) -> float:
        """By how much the measurement is worse: .1 is 10 %; negative when it is better."""
        grows = any(word in self.measurement for word in _GROWS)
        return 1 / self.ratio - 1 if grows else self.ratio - 1

    def finding(self, threshold: float) -> str:
        """REGRESSION, slower, faster, same, gone or new."""
        if self.after is None:
            return "gone"
        if self.before is None:
            return "new"
        if self.is_noise:
            return "same"
        if self.slowdown > threshold:
            return "REGRESSION"
        return "slower" if self.slowdown > 0 else "faster"


def check_comparable(before: Result, after: Result, *, any_device: bool) -> list[str]:
    """What else differs, in words; settings that differ are listed, not refused, when they are only data.

    Raises:
        NotComparableError: two benchmarks, two configurations, or two devices.
    """
    for name in ("benchmark", "label"):
        if before[name] != after[name]:
            raise NotComparableError(f"{name} {before[name]!r} and {after[name]!r}")
    devices = [result["machine"]["device"] for result in (before, after)]
    if devices[0] != devices[1] and not any_device:
        raise NotComparableError(
            f"measured on {devices[0]} and on {devices[1]}; pass --any_device to compare them all the same"
        )
    different = [
        f"{name}: {before['config'].get(name)!r}, then {after['config'].get(name)!r}"
        for name in before["config"] | after["config"]
        if before["config"].get(name) != after["config"].get(name)
    ]
    harmless = ("rounds", "budget_s")
    serious = [line for line in different if not line.startswith(harmless)]
    if serious and not any_device:
        raise NotComparableError(
            f"other settings ({'; '.join(serious)}); measure again with the same, or pass --any_device"
        )
    versions = [result["machine"]["versions"] for result in (before, after)]
    return different + [
        f"{name} {versions[0].get(name)}, then {versions[1].get(name)}"
        for name in versions[0] | versions[1]
        if versions[0].get(name) != versions[1].get(name)
    ]


def compare(before: Result, after: Result) -> list[Change]:
    """Every measurement of every row of both files."""
    old, new = _measurements(before), _measurements(after)
    return [
        Change(*name, before=old.get(name), after=new.get(name))
        for name in dict.fromkeys([*old, *new])
    ]


def _measurements(result: Result) -> dict[tuple[str, str], Mapping[str, float]]:
    return {
        (_row_name(row), name): value
        for row in result["rows"]
        for name, value in row.items()
        if _is_measurement(value)
    }


def _is_measurement(value: Any) -> bool:
    return isinstance(value, dict) and {"median", "min", "max", "n"} <= value.keys()


def _row_name(row: Mapping[str, Any]) -> str:
    """What was chosen, not what was found: words, and whole numbers such as the batch size."""
    chosen = ("version", "views", "end")  # prose and versions change without the row being another
    return ", ".join(
        f"{value}" if isinstance(value, str) else f"{name} {value}"
        for name, value in row.items()
        if isinstance(value, str | int) and name not in chosen
    )


def _lines(changes: list[Change], threshold: float) -> Iterator[tuple[str, ...]]:
    for change in changes:
        yield (
            change.row,
            change.measurement,
            _range(change.before),
            _range(change.after),
            f"{change.ratio:.3f}",
            change.finding(threshold),
        )


def _range(summary: Mapping[str, float] | None) -> str:
    if summary is None:
        return "-"
    median, low, high = (f"{summary[name]:.4g}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def compare_files(old: Path, new: Path, *, threshold: float, any_device: bool) -> int:
    """Print the comparison; returns an exit code for scripts.

    Args:
        old: Result file to compare with.
        new: Result file to judge.
        threshold: How much worse a median may be: 0.05 is 5 %.
        any_device: Whether to compare other devices and settings too.

    Returns:
        1: something is slower, or a row is gone; else 0.

    Raises:
        CmaeError: A file cannot be read or is no result, or the two are not comparable.
    """
    before, after = read_result(old), read_result(new)
    try:
        notes = check_comparable(before, after, any_device=any_device)
    except NotComparableError as error:
        raise CmaeError(f"{old} and {new} do not compare: {error}") from error
    changes = compare(before, after)
    table = Table()
    for name in ("row", "measurement", "old", "new", "new / old", "finding"):
        table.add_column(name, overflow="fold")
    for line in _lines(changes, threshold):
        table.add_row(*line, style="bold red" if line[-1] in ("REGRESSION", "gone") else "")
    console = PlainConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in notes:
        console.print(f"differs: {note}", soft_wrap=True)
    findings = [change.finding(threshold) for change in changes]
    return int(bool({"REGRESSION", "gone"} & set(findings)))


def read_result(path: Path) -> Result:
    """Contents of a result file.

    Raises:
        CmaeError: It cannot be read or is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = {"benchmark", "label", "machine", "config", "rows"} <= result.keys()
        _measurements(result)
        known = known and isinstance(result["machine"]["device"], str)
    except OSError as error:
        raise CmaeError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise CmaeError(f"{path} is no result file of `cmae bench`: name one of its JSON files")
    return dict(result)
