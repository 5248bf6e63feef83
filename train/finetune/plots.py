"""Pictures of an evaluation."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Int64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_MOST_NAMES = 64
"""Classes whose names are written."""


def confusion_plot(confusion: Int64[Tensor, "C C"], names: list[str], path: Path) -> None:
    """Draw which class is taken for which.

    Args:
        confusion: Counts; row the class, column the answer.
        names: Names of the classes.
        path: PNG to write.
    """
    shares = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    count = len(names)
    side = min(14.0, max(5.0, 0.18 * count + 2.5))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("answer")
    axes.set_ylabel("class")
    axes.set_title("share of a class's images by answer", loc="left", fontsize=11)
    if count <= _MOST_NAMES:
        size = 8 if count <= 32 else 6
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=110)
