"""Ranges of a run's metrics that are expected, drawn behind its curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.train.config_parser import RECIPES, nearest, recipe_names

Band = list[tuple[float, float, float]]
"""(step, low, high), by step."""

DEVIATIONS = 4.0
"""Half the height of a band in standard deviations: 98.4 % of runs for five seeds (Student's t)."""
LEAST = 0.005
"""Least half height, as a share of the curve's extent: seeds may agree closer than two machines do."""
METRICS = (
    "total",
    "reconstruction",
    "contrastive_raw",
    "positive_similarity",
    "negative_similarity",
    "knn_online",
    "knn_target",
    "linear_online",
    "linear_target",
    "rankme_online",
    "rankme_target",
)
"""Metrics that have bands: what learning decides, and not the machine."""


def load_bands(name: str) -> dict[str, Band]:
    """Bands by metric.

    Args:
        name: YAML file that `cmae compare --write_bands` wrote, or the name of one that ships with the
            package; '' for none.

    Raises:
        CmaeError: Neither of them, or its content is something else.
    """
    if not name:
        return {}
    path = expand_home(name)
    source = path if path.is_file() else RECIPES / "bands" / f"{name}.yaml"
    if not source.is_file():
        raise CmaeError(
            f"run.bands={name}: it must be a file that `cmae compare --write_bands` wrote, or one of "
            f"{', '.join(recipe_names('bands'))}{nearest(name, recipe_names('bands'))}",
            key="run.bands",
        )
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        return {
            metric: [(float(step), float(low), float(high)) for step, low, high in rows]
            for metric, rows in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CmaeError(
            f"run.bands={name}: {source} is no file of bands ({error}); expected "
            "metric: [[step, low, high], ...]",
            key="run.bands",
        ) from error


def make_bands(runs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Band]:
    """Mean over runs that differ in their seed, and `DEVIATIONS` standard deviations around it.

    Args:
        runs: Records of each run's metrics.

    Raises:
        CmaeError: There are fewer than three runs, or they have no step in common.
    """
    if len(runs) < 3:
        raise CmaeError(f"bands need three runs or more that differ in their seed, not {len(runs)}")
    bands: dict[str, Band] = {}
    for metric in METRICS:
        curves = [{r["step"]: r[metric] for r in records if metric in r} for records in runs]
        steps = sorted(set.intersection(*map(set, curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        if not steps or not any(any(row) for row in values):
            continue
        means = [statistics.fmean(row) for row in values]
        least = LEAST * (max(means) - min(means))
        bands[metric] = [
            (step, *_around(mean, max(least, DEVIATIONS * statistics.stdev(row))))
            for step, mean, row in zip(steps, means, values, strict=True)
        ]
    if not bands:
        raise CmaeError("the runs have no step in common: give runs of the same run.log_every")
    return bands


def _around(mean: float, half: float) -> tuple[float, float]:
    return float(f"{mean - half:.4g}"), float(f"{mean + half:.4g}")


def write_bands(bands: Mapping[str, Band], path: Path) -> None:
    """Write what `load_bands` reads."""
    lines = [
        f"{metric}:\n" + "".join(f"- {list(row)}\n" for row in bands[metric]) for metric in bands
    ]
    path.write_text("".join(lines), encoding="utf-8")


def outside(records: Sequence[Mapping[str, float]], bands: Mapping[str, Band]) -> list[str]:
    """What lies outside its band at the last step where there is one; a line for each metric."""
    found = []
    for metric, band in bands.items():
        own = {record["step"]: record[metric] for record in records if metric in record}
        shared = [row for row in band if row[0] in own]
        if not shared:
            continue
        step, low, high = shared[-1]
        if not (math.isfinite(own[step]) and low <= own[step] <= high):
            found.append(
                f"{metric} is {own[step]:.4g} at step {step:.0f}, expected {low:.4g} to {high:.4g}"
            )
    return found
