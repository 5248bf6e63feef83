"""Files beside the shards of a data set: class names, and what was done to the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cmae.pipeline.formats.presized import downscaled_line, sum_counts

CLASSES_FILE = "classes.json"
DATASET_FILE = "dataset.json"
SKIPPED_FILE = "skipped.jsonl"


def load_classes(folder: str | Path) -> list[str] | None:
    """Class names beside the shards, by label; None where there is no `classes.json`."""
    path = Path(folder) / CLASSES_FILE
    return [str(name) for name in json.loads(path.read_text())] if path.exists() else None


def stated_downscaled(shards: Sequence[str | Path]) -> str:
    """What `dataset.json` beside these local tars says of downscaled images; '' where there is no such file.

    For tars that are read without an index. The counts are those of the whole folder.
    """
    folders = {Path(shard).parent for shard in shards}
    summaries = [
        json.loads(path.read_text())
        for folder in sorted(folders)
        if (path := folder / DATASET_FILE).exists()
    ]
    counts = sum_counts(summary.get("presized", {}) for summary in summaries)
    return downscaled_line(counts, sum(summary.get("num_samples", 0) for summary in summaries))
