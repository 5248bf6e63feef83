"""Plots of a run from its metrics file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmae.errors import CmaeError
from cmae.train.monitor.bands import Band
from cmae.train.monitor.metrics import read_metrics


@dataclass(frozen=True)
class Panel:
    """Metrics that are drawn over each other."""

    title: str
    keys: dict[str, str]
    """Metric -> label of its line."""
    from_zero: bool = False


PANELS = (
    Panel("total loss", {"total": "total"}),
    Panel("pixel loss (masked patches)", {"reconstruction": "reconstruction"}),
    Panel("contrastive loss, unweighted", {"contrastive_raw": "contrastive"}),
    Panel(
        "cosine in the projection space",
        {"positive_similarity": "same image", "negative_similarity": "other images"},
    ),
    Panel(
        "k-NN accuracy while training",
        {"knn_online": "online encoder", "knn_target": "target encoder"},
        from_zero=True,
    ),
    Panel(
        "linear probe while training",
        {"linear_online": "online encoder", "linear_target": "target encoder"},
        from_zero=True,
    ),
    Panel("effective rank of the features", {"rankme_online": "online", "rankme_target": "target"}),
    Panel("learning rate", {"lr": "lr"}, from_zero=True),
    Panel("norm of the gradients", {"grad_norm": "norm"}, from_zero=True),
    Panel("loss scale", {"loss_scale": "scale"}, from_zero=True),
    Panel("images / s", {"images_per_s": "images / s"}, from_zero=True),
)
"""What a run's curves are, in their order."""

_OLDER_NAMES = {"info_nce": "contrastive_raw"}
_COLOURS = ("#1f5fa8", "#d9822b")
_GRAY = "#8a8a8a"
_EXPECTED = "expected"


def loss_plot(metrics: Path, path: Path, bands: Mapping[str, Band] | None = None) -> None:
    """Draw losses, similarities, learning rate and speed over the steps of a run.

    Terms that the model does not have (zero throughout) are left out.

    Args:
        metrics: File `metrics.jsonl` of a run.
        path: PNG to write.
        bands: Ranges that are expected, by metric.

    Raises:
        CmaeError: there is no record yet.
    """
    records = [_in_todays_words(record) for record in read_metrics(metrics)]
    if not records:
        raise CmaeError(f"{metrics} holds no record; a run writes one every run.log_every steps")
    panels = [panel for panel in PANELS if any(_is_present(records, key) for key in panel.keys)]
    num_rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 3.1 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(num_rows, 3, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, records, bands or {})
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=120)


def _draw(
    axes: Axes, panel: Panel, records: list[dict[str, float]], bands: Mapping[str, Band]
) -> None:
    steps = [record["step"] for record in records]
    for (key, label), colour in zip(panel.keys.items(), _COLOURS, strict=False):
        # What is not in every record (scores of an epoch) is joined over the others.
        points = [(step, one[key]) for step, one in zip(steps, records, strict=True) if key in one]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=label)
            if band := [row for row in bands.get(key, ()) if row[0] <= steps[-1]]:
                at, low, high = zip(*band, strict=True)
                # The label of the first serves for both.
                shown = _EXPECTED if key == next(iter(panel.keys)) else None
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0, label=shown)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel("step", fontsize=9, color=_GRAY)
    axes.tick_params(labelsize=9, colors=_GRAY)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(panel.keys) > 1 or any(key in bands for key in panel.keys):
        axes.legend(fontsize=9, frameon=False)
    if "images_per_s" in panel.keys:
        _draw_waiting(axes.twinx(), steps, records)


def _draw_waiting(axes: Axes, steps: list[float], records: list[dict[str, float]]) -> None:
    """Share of the time that the loop waited for data, on the right-hand axis."""
    waiting = [record.get("data_wait_pct", float("nan")) for record in records]
    axes.fill_between(steps, waiting, color=_COLOURS[1], alpha=0.25, linewidth=0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("waiting for data, %", fontsize=9, color=_COLOURS[1])
    axes.tick_params(labelsize=9, colors=_COLOURS[1])
    axes.spines[["top"]].set_visible(False)


def _in_todays_words(record: dict[str, float]) -> dict[str, float]:
    """A record whose terms have their names of today; runs that began earlier wrote others."""
    return {_OLDER_NAMES.get(name, name): value for name, value in record.items()}


def _is_present(records: list[dict[str, float]], key: str) -> bool:
    """Whether the metric was ever there and not zero."""
    return any(record.get(key) for record in records)


def sweep_plot(values: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw accuracies of variants: a dot for each seed, a bar at the mean, a line at the first variant.

    Args:
        values: Shares by seed, by variant, by metric.
        path: PNG to write.
    """
    count = max(len(one) for one in values.values())
    height = 1.2 + 0.32 * count
    figure = Figure(figsize=(5.2 * len(values), height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    for axes, (metric, by_name) in zip(panels, values.items(), strict=True):
        for row, (_, shares) in enumerate(by_name.items()):
            percent = [100 * share for share in shares]
            axes.plot(percent, [row] * len(percent), "o", color=_COLOURS[0], alpha=0.55, ms=5)
            mean = sum(percent) / len(percent)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=_COLOURS[1], linewidth=2.5)
            if row == 0:
                axes.axvline(mean, color=_GRAY, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(by_name)), list(by_name), fontsize=9)
        axes.set_ylim(len(by_name) - 0.5, -0.5)
        axes.set_title(f"{metric}, top-1 %", fontsize=11, loc="left")
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
