"""Geometry of the plots in the HTML report: fractions of the plot's width and height, drawn by the template.

The marks are SVG with the page's own colours and fonts, so that they follow light and dark and stay sharp;
a picture made by a plotting library would be right for one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.ticker import MaxNLocator

from cmae.pipeline.stage_stats import Histogram
from cmae.train.profiling.analysis.records import Curve, Part
from cmae.train.profiling.report.terminal import format_number, waterfall

_FEWEST = 5
"""Values below which a histogram shows nothing."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Span:
    """A horizontal stretch of a row: a bar, or the interval over it. `width` may be 0."""

    left: float
    width: float


@dataclass(frozen=True)
class WaterfallRow:
    """Bar of one part of the step, and its 95 % interval at the end where the next part begins."""

    bar: Span
    interval: Span


@dataclass(frozen=True)
class BarChart:
    """A histogram."""

    title: str
    x_label: str
    bars: tuple[tuple[float, float, float], ...]
    """(left, width, height) of each bin that is not empty."""
    x_ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...]
    """Percentiles, as vertical lines."""
    summary: str
    """The same in words."""


@dataclass(frozen=True)
class LineChart:
    """Predicted rate over one setting."""

    title: str
    x_label: str
    points: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    now: tuple[float, float]
    summary: str


def waterfall_rows(parts: tuple[Part, ...], step_ms: float) -> list[WaterfallRow]:
    """Parts of the step laid end to end; the scale holds every bar and every interval."""
    spans = [(start, start + part.ms.value, part.ms) for part, start in waterfall(parts)]
    highs = [start + ms.high for start, _, ms in spans]
    lows = [start + ms.low for start, _, ms in spans]
    first, last = min([0.0, *lows]), max([step_ms, *highs])
    scale = 1 / max(last - first, 1e-9)

    def span(left: float, right: float) -> Span:
        left, right = sorted((left, right))
        return Span((left - first) * scale, (right - left) * scale)

    return [
        WaterfallRow(span(start, end), span(start + ms.low, start + ms.high))
        for start, end, ms in spans
    ]


def step_histogram(title: str, times_ms: Sequence[float]) -> BarChart | None:
    """Distribution of single steps; the axis is logarithmic when they differ by more than 4x.

    None where there are too few for a shape.
    """
    if len(times_ms) < _FEWEST:
        return None
    times = np.asarray(times_ms, dtype=np.float64)
    low, high = float(times.min()), float(times.max())
    is_wide = high > 4 * max(low, 1e-6)
    if high <= low:
        low, high = 0.95 * low, 1.05 * high + 1e-6
    edges = np.geomspace(max(low, 1e-6), high, 31) if is_wide else np.linspace(low, high, 31)
    counts, _ = np.histogram(times, edges)
    marks = {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)}
    return _bar_chart(title, "ms a step", edges, counts, marks=marks, log=is_wide)


def latency_histogram(title: str, histogram: Histogram) -> BarChart | None:
    """Distribution of a stage's latencies on a logarithmic axis; None where there are too few for a shape."""
    if histogram.total < _FEWEST:
        return None
    counts = np.asarray(histogram.counts)
    (filled,) = np.nonzero(counts)
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = 1e-3 * 10 ** (np.arange(first, last + 1) / 20)  # ms; bin i begins at 10 ** (i / 20) us
    marks = {f"p{q}": 1000 * histogram.percentile_s(q) for q in (50, 99)}
    return _bar_chart(title, "ms", edges, counts[first:last], marks=marks, log=True)


def _bar_chart(
    title: str,
    x_label: str,
    edges: np.ndarray,
    counts: np.ndarray,
    *,
    marks: dict[str, float],
    log: bool,
) -> BarChart:
    low, high = float(edges[0]), float(edges[-1])

    def place(value: float) -> float:
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    lefts = [place(float(edge)) for edge in edges]
    bars = tuple(
        (left, right - left, float(count / counts.max()))
        for (left, right), count in zip(pairwise(lefts), counts, strict=True)
        if count
    )
    ticks = _log_ticks(low, high) if log else _linear_ticks(low, high)
    return BarChart(
        title,
        x_label + (", logarithmic" if log else ""),
        bars,
        tuple(Tick(place(value), _short(value)) for value in ticks),
        tuple(Tick(min(max(place(value), 0.0), 1.0), name) for name, value in marks.items()),
        f"n {int(counts.sum())}, "
        + ", ".join(f"{name} {format_number(value)} ms" for name, value in marks.items()),
    )


def line_chart(curve: Curve) -> LineChart:
    """A what-if curve; its rate axis begins at zero, its other one is logarithmic where x spans 16x."""
    low, high = min(*curve.x, curve.now), max(*curve.x, curve.now)
    log = 0 < 16 * low <= high
    y_values = [float(y) for y in MaxNLocator(nbins=4).tick_values(0, max(curve.images_per_s))]
    top = max(y_values[-1], 1e-9)

    def place(x: float) -> float:
        if log:
            return math.log(x / low) / math.log(high / low)
        return (x - low) / max(high - low, 1e-9)

    now_rate = float(np.interp(curve.now, curve.x, curve.images_per_s))
    best = int(np.argmax(curve.images_per_s))
    return LineChart(
        curve.title,
        curve.x_label,
        tuple((place(x), y / top) for x, y in zip(curve.x, curve.images_per_s, strict=True)),
        tuple(Tick(place(x), _short(x)) for x in (curve.x if log else _linear_ticks(low, high))),
        tuple(Tick(y / top, f"{y:,.0f}") for y in y_values),
        (place(curve.now), now_rate / top),
        f"now {_short(curve.now)}: {format_number(now_rate)} images/s; best at {_short(curve.x[best])}: "
        f"{format_number(curve.images_per_s[best])} images/s",
    )


def _linear_ticks(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(nbins=5).tick_values(low, high)
    return [float(tick) for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade; over many decades the decades alone."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [base * 10.0**power for power in exponents for base in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) > 6:
        return [10.0**power for power in exponents if low <= 10.0**power <= high]
    return inside if len(inside) > 1 else [low, high]


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
