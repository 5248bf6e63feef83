"""A profile, or two side by side, as one HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmae.train.profiling.analysis.records import Phase, Profile
from cmae.train.profiling.analysis.stages import (
    WHAT,
    StageShares,
    format_number,
    loader_phase,
    loader_window,
    stage_shares,
)
from cmae.train.profiling.report.charts import (
    Chart,
    breakdown_chart,
    latency_histogram,
    line_chart,
    step_histogram,
)
from cmae.train.profiling.report.diff import CAUTION, ProfileDiff, describe_change
from cmae.train.profiling.report.terminal import (
    component_cells,
    flatten,
    format_interval,
    format_overrides,
    format_value,
    images_per_s,
    label,
    machine_line,
    operation_rows,
    prediction_error,
    speedup,
)


def write_html(profile: Profile, path: Path) -> None:
    """Write the report of one profile."""
    phase = loader_phase(profile)
    stages = [] if phase is None else stage_shares(loader_window(phase))
    _write(
        "profile.html.j2",
        path,
        profile=profile,
        chart=breakdown_chart(profile.breakdown),
        phase=phase,
        stages=stages,
        histograms=_histograms(profile, stages),
        curves=[line_chart(curve) for curve in profile.curves],
        operations=operation_rows(profile),
        rate=images_per_s(profile),
        gains=[(action, speedup(action, profile)) for action in profile.actions],
    )


def write_diff_html(diff: ProfileDiff, path: Path) -> None:
    """Write the comparison of two profiles."""
    _write("diff.html.j2", path, diff=diff, caution=CAUTION)


def _histograms(profile: Profile, stages: list[StageShares]) -> list[Chart]:
    shown = [_phase(profile, name) for name in ("full", "synthetic")]
    charts: list[Chart | None] = [
        step_histogram(f"steps, phase {phase.name}", phase.step_times_ms)
        for phase in shown
        if phase is not None
    ]
    charts += [latency_histogram(f"stage {one.name}", one.stage.histogram) for one in stages]
    return [chart for chart in charts if chart is not None]


def _phase(profile: Profile, name: str) -> Phase | None:
    return next((phase for phase in profile.phases if phase.name == name), None)


def _write(template: str, path: Path, **values: Any) -> None:
    environment = Environment(
        loader=PackageLoader("cmae.train.profiling.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "interval": format_interval,
        "label": label,
        "overrides": format_overrides,
        "cell": format_value,
    }
    environment.globals |= {
        "component_cells": component_cells,
        "prediction_error": prediction_error,
        "machine_line": machine_line,
        "describe_change": describe_change,
        "flatten": flatten,
        "WHAT": WHAT,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = environment.get_template(template).render(**values)
    # A path in another encoding than the locale's has characters that UTF-8 does not.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
