"""Files beside the shards of a data set: class names, and what was done to the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmae.errors import CmaeError
from cmae.pipeline.formats.presized import downscaled_line, sum_counts

CLASSES_FILE = "classes.json"
DATASET_FILE = "dataset.json"
SKIPPED_FILE = "skipped.jsonl"
DIGESTS_FILE = "SHA256SUMS"
"""Digest of every tar, as `sha256sum -c SHA256SUMS` reads it."""

MAX_JSON_BYTES = 256 << 20
"""Larger files beside the shards are refused."""


def load_classes(folder: str | Path) -> list[str] | None:
    """Class names beside the shards, by label; None where there is no `classes.json`."""
    path = Path(folder) / CLASSES_FILE
    if not path.exists():
        return None
    names = read_json(path)
    if not isinstance(names, list):
        raise CmaeError(f"{path} is no list of class names: correct it, or remove it")
    return [str(name) for name in names]


def read_json(path: Path) -> Any:
    """Contents of a JSON file.

    Raises:
        CmaeError: It is larger than MAX_JSON_BYTES, or no JSON; names the file.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CmaeError(
            f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: correct it, or remove it"
        )
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise CmaeError(f"{path} is no JSON ({what}): correct it, or remove it") from error


def read_dataset(path: Path) -> dict[str, Any]:
    """Contents of a `dataset.json`.

    Raises:
        CmaeError: It does not hold what this program writes; names the file.
    """
    facts = read_json(path)
    kinds = {"settings": dict, "presized": dict, "num_samples": int}
    is_ours = isinstance(facts, dict) and all(
        isinstance(facts.get(name, kind()), kind) for name, kind in kinds.items()
    )
    if not is_ours or not all(isinstance(one, int) for one in facts.get("presized", {}).values()):
        raise CmaeError(f"{path} is not what `cmae shards write` makes: correct it, or remove it")
    return dict(facts)


def stated_downscaled(shards: Sequence[str | Path]) -> str:
    """What `dataset.json` beside these local tars says of downscaled images; '' where there is no such file.

    For tars that are read without an index. The counts are those of the whole folder.
    """
    folders = {Path(shard).parent for shard in shards}
    summaries = [
        read_dataset(path) for folder in sorted(folders) if (path := folder / DATASET_FILE).exists()
    ]
    counts = sum_counts(summary.get("presized", {}) for summary in summaries)
    return downscaled_line(counts, sum(summary.get("num_samples", 0) for summary in summaries))
