"""Curves as SVG whose colours follow the page's theme."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TEXT, GRID = "#010203", "#040506"
LINES = ("#070809", "#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718")
_VARIABLES = {
    TEXT: "var(--muted)",
    GRID: "var(--line)",
    **dict(zip(LINES, [f"var(--line-{number})" for number in range(1, 7)], strict=True)),
}

Points = Sequence[tuple[float, float]]
"""(step, value)."""


def curve_chart(
    lines: Mapping[str, Points],
    *,
    from_zero: bool = False,
    band: Sequence[tuple[float, float, float]] = (),
    size: tuple[float, float] = (4.6, 2.5),
) -> Markup:
    """Lines over steps, with a legend where there are several.

    Args:
        lines: Points by label; empty ones are left out.
        from_zero: Whether the vertical axis begins at 0.
        band: Range that is expected: (step, low, high).
        size: Width and height, inches of 72 units.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cmae"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        if band:
            steps, low, high = zip(*band, strict=True)
            axes.fill_between(steps, low, high, color=GRID, alpha=0.6, linewidth=0)
        for (label, points), colour in zip(lines.items(), LINES, strict=False):
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
        axes.tick_params(labelsize=8, colors=TEXT, length=3)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False, labelcolor=TEXT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)
