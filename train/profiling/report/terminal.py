"""A profile in the terminal: the diagnosis first, then what it rests on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cmae.printable import MAX_LINE, printable
from cmae.train.monitor.console import PlainConsole, labelled
from cmae.train.profiling.analysis.breakdown import waterfall
from cmae.train.profiling.analysis.records import Action, Component, Estimate, Profile
from cmae.train.profiling.analysis.stages import (
    NARROW,
    format_number,
    loader_phase,
    loader_window,
    stage_shares,
    stage_table,
)

_BAR_WIDTH, _NARROW_BAR_WIDTH = 28, 14
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_profile(profile: Profile, console: PlainConsole) -> None:
    """Print diagnosis, breakdown of the step, stages, actions, cost of images and notes."""
    console.print(_headline(profile))
    console.print(_breakdown(profile, console.width))
    phase = loader_phase(profile)
    if phase is not None:
        stages = stage_shares(loader_window(phase))
        console.print(stage_table(stages, f"Stages, phase {phase.name}", console.width))
    for table in _optional_tables(profile):
        console.print(table)
    for note in profile.notes:
        console.print(labelled("note:", note, "dim"), soft_wrap=True)


def format_interval(estimate: Estimate) -> str:
    """The 95 % interval in words."""
    return f"{format_number(estimate.low)} to {format_number(estimate.high)}"


def format_overrides(overrides: Mapping[str, Any]) -> str:
    """Dotted settings as they are typed: `--data.num_threads 8`."""
    return " ".join(f"--{key} {_argument(value)}" for key, value in overrides.items())


def _argument(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def label(name: str) -> str:
    """`host_to_device` -> 'host to device'."""
    return name.replace("_", " ")


def speedup(action: Action, profile: Profile) -> float:
    """Predicted rate over today's; nan where today's is not known."""
    now = images_per_s(profile)
    return action.predicted_images_per_s / now if now else float("nan")


def images_per_s(profile: Profile) -> float:
    """Rate of the full run over all ranks: the phase's own where it is there, else from the mean step."""
    full = [phase for phase in profile.phases if phase.name == "full"]
    if full:
        return full[0].images_per_s.value
    return 1000 * profile.global_batch_size / profile.step_ms.value


def prediction_error(action: Action) -> float | None:
    """Predicted over measured rate, less one; None before `--verify`."""
    measured = action.measured_images_per_s
    if measured is None or not measured.value:
        return None
    return action.predicted_images_per_s / measured.value - 1


def machine_line(profile: Profile) -> str:
    """Device, cores, versions: whatever the profile says about its machine, short."""
    machine = profile.machine
    named = [str(machine[key]) for key in ("device", "cpu") if machine.get(key)]
    if machine.get("cores"):
        named.append(f"{machine['cores']:g} cores")
    if machine.get("git"):
        named.append(f"revision {machine['git']}")
    return ", ".join(dict.fromkeys(named))


def _headline(profile: Profile) -> Panel:
    rate, step = images_per_s(profile), profile.step_ms
    ranks = "1 rank" if profile.world_size == 1 else f"{profile.world_size} ranks"
    facts = (
        f"step {format_number(step.value)} ms ({format_interval(step)}), "
        f"{format_number(rate)} images/s, global batch {profile.global_batch_size}, {ranks}; "
        f"head-room {format_number(profile.diagnosis.headroom)}x"
    )
    sentence, machine = (
        printable(line, limit=MAX_LINE)
        for line in (profile.diagnosis.sentence, machine_line(profile))
    )
    text = Text.assemble((sentence, "bold"), "\n", facts, "\n", (machine, "dim"))
    bottleneck = printable(label(profile.diagnosis.bottleneck))
    return Panel(text, title=Text(f"bound by {bottleneck}"), title_align="left")


def _breakdown(profile: Profile, width: int) -> Table:
    bar_width = _NARROW_BAR_WIDTH if width < NARROW else _BAR_WIDTH
    table = Table(title="\nBreakdown of the step", title_justify="left", title_style="bold")
    table.add_column("component", no_wrap=True)
    for name in ("ms", "95 % interval", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", width=bar_width, no_wrap=True)
    if width >= NARROW:
        table.add_column("how it was found", overflow="fold", style="dim")
    cells = bar_width / _extent(profile.breakdown)
    for one, start in waterfall(profile.breakdown):
        bar = _floating_bar(start * cells, one.ms.value * cells, bar_width)
        table.add_row(
            label(one.name),
            *component_cells(one.ms, profile.step_ms),
            Text(bar, style=_style(one)),
            *[one.note][: width >= NARROW],
        )
    table.add_section()
    table.add_row("step", *component_cells(profile.step_ms, profile.step_ms), style="bold")
    return table


def component_cells(ms: Estimate, step: Estimate) -> tuple[str, str, str]:
    """Milliseconds, interval and share of the step, with as many decimals as the step is worth."""
    decimals = 1 if step.value >= 50 else 2 if step.value >= 5 else 3
    value, low, high = (f"{_without_minus_zero(x, decimals):.{decimals}f}" for x in _ends(ms))
    share = _without_minus_zero(100 * ms.value / step.value, 0)
    return value, f"{low} to {high}", f"{share:.0f}%"


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _without_minus_zero(value: float, decimals: int) -> float:
    return round(value, decimals) + 0.0


def _extent(breakdown: Sequence[Component]) -> float:
    ends = [start + max(one.ms.value, 0.0) for one, start in waterfall(breakdown)]
    return max([*ends, 1e-9])


def _style(one: Component) -> str:
    return {"model": "blue", "residual": "white"}.get(one.name, "yellow")


def _floating_bar(start: float, length: float, width: int) -> str:
    """A bar of `length` cells that begins at cell `start`; a negative length runs back."""
    left, right = sorted((start, start + length))
    # The left edge falls on a whole cell: blocks fill from the left only.
    first = min(int(max(left, 0.0)), width - 1)
    eighths = max(1, round(8 * (right - first))) if length else 0
    full, rest = divmod(min(eighths, 8 * (width - first)), 8)
    return " " * first + "█" * full + _EIGHTHS[rest].strip()


def _optional_tables(profile: Profile) -> Iterator[Table]:
    if profile.actions:
        yield _actions(profile)
    if profile.operations:
        yield _plain_table("What each operation on an image costs", operation_rows(profile))
    if profile.slow_images:
        yield _plain_table("Time of an image by kind and size of JPEG", profile.slow_images)
    if profile.gpu:
        rows = [{"engine": name, "load": value} for name, value in flatten(profile.gpu).items()]
        yield _plain_table("GPU during the full run", tuple(rows))
    yield _phases(profile)


def _actions(profile: Profile) -> Table:
    table = Table(title="\nWhat to change", title_justify="left", title_style="bold")
    table.add_column("action", overflow="fold")
    table.add_column("predicted\nimages/s", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("next bottleneck", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_column("error", justify="right", no_wrap=True)
    for action in profile.actions:
        measured, error = action.measured_images_per_s, prediction_error(action)
        what = Text(printable(action.what, limit=MAX_LINE))
        if action.overrides:
            overrides = printable(format_overrides(action.overrides), limit=MAX_LINE)
            what.append(f"\n{overrides}", "cyan")
        table.add_row(
            what,
            format_number(action.predicted_images_per_s),
            f"{speedup(action, profile):.2f}x",
            label(action.then_bottleneck),
            f"{format_number(measured.value)} ({format_interval(measured)})" if measured else "-",
            "-" if error is None else f"{error:+.0%}",
        )
    return table


def _phases(profile: Profile) -> Table:
    table = Table(title="\nPhases", title_justify="left", title_style="bold")
    table.add_column("phase", no_wrap=True)
    table.add_column("what runs", overflow="fold", style="dim")
    for name in ("ms a step", "95 % interval", "images/s", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in profile.phases:
        table.add_row(
            phase.name,
            phase.what,
            format_number(phase.step_ms.value),
            format_interval(phase.step_ms),
            format_number(phase.images_per_s.value),
            str(phase.step_ms.n),
        )
    return table


def operation_rows(profile: Profile) -> tuple[dict[str, Any], ...]:
    """Operations on an image with their costs, in the order in which they are done."""
    total = sum(one.cpu_ms.value for one in profile.operations)
    return tuple(
        {
            "operation": one.name,
            "CPU ms": one.cpu_ms.value,
            "95 % interval": format_interval(one.cpu_ms),
            "share": f"{100 * one.cpu_ms.value / total:.0f}%",
            "wall ms": one.wall_ms.value,
            "images/s up to here": one.images_per_s,
        }
        for one in profile.operations
    )


def _plain_table(title: str, rows: tuple[Mapping[str, Any], ...]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    for name in rows[0]:
        is_number = isinstance(rows[0][name], int | float)
        table.add_column(label(name), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(format_value(value) for value in row.values()))
    return table


def format_value(value: Any) -> str:
    """A cell: floats to three digits, '-' for what is not there, the rest as it is."""
    if value is None:
        return "-"
    return format_number(value) if isinstance(value, float) else str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
