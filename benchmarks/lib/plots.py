"""Plots of result files, for docs/images. benchmarks/tables.py calls this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Result = dict[str, Any]
_COLOURS = ("#1f5fa8", "#b05a00", "#7a3e9d", "#1a7031")
_GRAY = "#535c66"


def draw_growth(result: Result, path: Path) -> None:
    """Seconds and memory over the number of samples, both axes logarithmic."""
    figure, (left, right) = _figure(2)
    samples = [row["samples"] for row in result["rows"]]
    for name, label in (("startup_s", "start-up"), ("plan_s", "plan of an epoch")):
        _line(left, samples, [row[name] for row in result["rows"]], label)
    for name, label in (
        ("index_mib", "peak of loading the index"),
        ("peak_mib", "peak with the plan"),
    ):
        _line(right, samples, [row[name] for row in result["rows"]], label)
    for axes, title in ((left, "CPU seconds"), (right, "memory, MiB")):
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1e-3 if axes is left else 1)
        _finish(axes, title, "samples in the index")
    _save(figure, result, path)


def draw_sweep(result: Result, path: Path) -> None:
    """images/s over one setting."""
    figure, (axes,) = _figure(1)
    name = result["label"].replace("-", "_")
    rows = [row for row in result["rows"] if "images_per_s" in row]  # not those out of memory
    x = [row[name] for row in rows]
    _line(axes, x, [row["images_per_s"] for row in rows], "images/s")
    axes.set_ylim(bottom=0)
    axes.set_xticks(x)
    _finish(axes, "images/s", name.replace("_", " "))
    _save(figure, result, path)


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.2 * columns, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _line(axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, float]], label: str) -> None:
    """Medians as a line, the range of the rounds as a band."""
    colour = _COLOURS[len(axes.lines)]
    axes.plot(x, [row["median"] for row in rows], "o-", color=colour, markersize=4, label=label)
    low, high = ([row[name] for row in rows] for name in ("min", "max"))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label, fontsize=9, color=_GRAY)
    axes.tick_params(labelsize=9, colors=_GRAY)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(fontsize=9, frameon=False)


def _save(figure: Figure, result: Result, path: Path) -> None:
    machine = result["machine"]
    figure.supxlabel(
        f"{machine['device']}, revision {machine['git']}", fontsize=8, color=_GRAY, ha="center"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the writer's version in the file, equal results draw equal bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})


PLOTS: dict[str, Callable[[Result, Path], None]] = {"growth": draw_growth, "sweep": draw_sweep}


def draw_plots(found: Mapping[str, Sequence[tuple[Path, Result]]], folder: Path) -> list[Path]:
    """Draw the results that have a plot; the name holds benchmark, label and device.

    Args:
        found: (result file, its content) by benchmark.
        folder: Folder for the PNGs.
    """
    drawn = []
    for name, results in found.items():
        for source, result in results:
            _, benchmark, device, *_ = source.stem.split("_")
            label = f"_{result['label']}" if result["label"] else ""
            path = folder / f"bench_{benchmark}{label}_{device}.png"
            PLOTS[name](result, path)
            drawn.append(path)
    return drawn
