"""Plots of the HTML report: matplotlib's SVG in the page's own colours, light or dark."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from cmae.pipeline.stage_stats import Histogram
from cmae.train.profiling.analysis.breakdown import waterfall
from cmae.train.profiling.analysis.records import Component, Curve
from cmae.train.profiling.analysis.stages import format_number

# Colours of the light page. In the SVG each becomes the page's variable of its name; they must differ.
_TEXT, _MUTED, _LINE, _CARD = "#1b1f24", "#535c66", "#cdd4dc", "#f5f7f9"
_BUSY, _STARVED, _REST = "#1f5fa8", "#b05a00", "#6b7580"
_VARIABLES = {
    _TEXT: "text",
    _MUTED: "muted",
    _LINE: "line",
    _CARD: "card",
    _BUSY: "busy",
    _STARVED: "starved",
    _REST: "rest",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cmae",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
}

_FEWEST = 5
"""Values below which a histogram shows nothing."""
_WIDE = 4
"""Largest over smallest value from which on a histogram's axis is logarithmic."""
_COLOURS = {"model": _BUSY, "residual": _REST}
"""Bars of the breakdown; what keeps the step from the model has another colour."""


@dataclass(frozen=True)
class Chart:
    """One plot."""

    title: str
    svg: Markup
    summary: str
    """The same in words."""


def breakdown_chart(breakdown: Sequence[Component]) -> Chart:
    """Components of the step laid end to end, each with its 95 % interval where the next begins."""
    rows = list(waterfall(breakdown))
    summary = ", ".join(f"{one.name} {format_number(one.ms.value)} ms" for one, _ in rows)
    with _axes(width=8.0, height=0.5 + 0.27 * len(rows)) as (figure, axes):
        for row, (one, start) in enumerate(rows):
            end, ms = start + one.ms.value, one.ms
            axes.barh(row, ms.value, left=start, height=0.6, color=_COLOURS.get(one.name, _STARVED))
            reach = [[max(0.0, ms.value - ms.low)], [max(0.0, ms.high - ms.value)]]
            axes.errorbar(end, row, xerr=reach, color=_TEXT, linewidth=1.2, capsize=2.5)
        axes.set_yticks(range(len(rows)), [one.name.replace("_", " ") for one, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.grid(axis="x")
        axes.set_xlabel("ms of the step")
        return _chart(figure, "components of the step, end to end", summary)


def step_histogram(title: str, times_ms: Sequence[float]) -> Chart | None:
    """Distribution of single steps; None where there are too few for a shape."""
    if len(times_ms) < _FEWEST:
        return None
    times = np.asarray(times_ms, dtype=np.float64)
    low, high = max(float(times.min()), 1e-6), float(times.max())
    if high <= low:
        low, high = 0.95 * low, 1.05 * low
    spaced = np.geomspace if high > _WIDE * low else np.linspace
    counts, edges = np.histogram(times, spaced(low, high, 31))
    marks = {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)}
    return _histogram(title, "ms a step", edges, counts, marks)


def latency_histogram(title: str, histogram: Histogram) -> Chart | None:
    """Distribution of a stage's latencies; None where there are too few for a shape."""
    if histogram.total < _FEWEST:
        return None
    counts = np.asarray(histogram.counts)
    (filled,) = np.nonzero(counts)
    first, last = int(filled[0]), int(filled[-1]) + 1
    # In ms; bin i begins at 10 ** (i / 20) us.
    edges = 1e-3 * 10 ** (np.arange(first, last + 1) / 20)
    marks = {f"p{q}": 1000 * histogram.percentile_s(q) for q in (50, 99)}
    return _histogram(title, "ms", edges, counts[first:last], marks)


def _histogram(
    title: str, x_label: str, edges: np.ndarray, counts: np.ndarray, marks: dict[str, float]
) -> Chart:
    words = [f"{name} {format_number(value)} ms" for name, value in marks.items()]
    with _axes(width=3.6, height=2.0) as (figure, axes):
        axes.stairs(counts, edges, fill=True, color=_BUSY)
        for name, value in marks.items():
            axes.axvline(value, color=_TEXT, linewidth=1.2, linestyle=(0, (3, 2)))
            axes.annotate(
                name, (value, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom"
            )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        _scale_x(axes, float(edges[0]), float(edges[-1]))
        axes.set_xlabel(x_label)
        return _chart(figure, title, f"n {int(counts.sum())}, {', '.join(words)}")


def line_chart(curve: Curve) -> Chart:
    """A what-if curve; its rate axis begins at zero."""
    now = float(np.interp(curve.now, curve.x, curve.images_per_s))
    best = int(np.argmax(curve.images_per_s))
    summary = (
        f"now {_short(curve.now)}: {format_number(now)} images/s; best at {_short(curve.x[best])}: "
        f"{format_number(curve.images_per_s[best])} images/s"
    )
    with _axes(width=3.6, height=2.0) as (figure, axes):
        axes.plot(curve.x, curve.images_per_s, color=_BUSY, linewidth=2)
        axes.plot([curve.now], [now], "o", color=_STARVED, markerfacecolor=_CARD, markersize=6)
        axes.annotate("now", (curve.now, now), (6, -12), textcoords="offset points")
        axes.set_ylim(0, 1.08 * max(*curve.images_per_s, 1e-9))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.grid(axis="y")
        if 0 < 16 * min(curve.x) <= max(curve.x):
            axes.set_xscale("log", base=2)
            axes.set_xticks(curve.x, [_short(x) for x in curve.x])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(curve.x_label)
        return _chart(figure, curve.title, summary)


@contextmanager
def _axes(*, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot in the report's style; sizes in inches."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        yield figure, axes


def _scale_x(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis where the values differ by much."""
    axes.set_xlim(low, high)
    if high <= _WIDE * low:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        return
    axes.set_xscale("log")
    decades = math.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _chart(figure: Figure, title: str, summary: str) -> Chart:
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    text = file.getvalue()
    # The page has its own header, and its elements are not to be styled from here.
    text = text[text.index("<svg") :]
    text = text[: text.index("<style")] + text[text.index("</style>") + len("</style>") :]
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    label = escape(f"{title}: {summary}")
    return Chart(
        title, Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)), summary
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
