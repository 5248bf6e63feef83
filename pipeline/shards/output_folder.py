"""The folder that an offline tool writes: claimed, resumable, finished or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.dataset_folder import DATASET_FILE
from cmae.pipeline.formats.shard_index import StaleIndexError, load_index


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or refuse one with shards that these settings did not write.

    What a killed run left half written is removed.

    Raises:
        ValueError: It holds shards of another tool, source or setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = out / DATASET_FILE
    if summary.exists():
        before = json.loads(summary.read_text()).get("settings", {})
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            what = ", ".join(
                "the source"
                if name.startswith("source")
                else f"{name}: {before.get(name)} -> {settings[name]}"
                for name in changed
            )
            raise ValueError(
                f"{out} holds shards of another source or settings ({what}): use the same again "
                "to continue, remove the folder, or write to another one"
            )
    elif foreign := sorted(out.glob("*.tar")):
        raise ValueError(
            f"{out} holds {len(foreign)} tar file(s) such as {foreign[0].name} and no {DATASET_FILE}: "
            "write to a folder of its own"
        )
    for leftover in out.glob(".*.partial"):
        leftover.unlink()


def mark_begun(out: Path, settings: dict[str, Any]) -> None:
    """Write down that shards of these settings are being written."""
    write_json(out / DATASET_FILE, {"complete": False, "settings": settings})


def mark_complete(out: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write down that every shard is there, and what they hold together."""
    write_json(out / DATASET_FILE, {"complete": True, **facts, "settings": settings})


def is_finished(tar_path: Path) -> bool:
    """Whether the shard was written to its end: its index is there and fits."""
    try:
        load_index(tar_path)
    except (FileNotFoundError, StaleIndexError):
        return False
    return True


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ValueError: Fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"the shards still to be written need {needed / 2**30:.1f} GiB and {out} has "
            f"{free / 2**30:.1f} GiB free: make room, or write to another disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def tidy_skipped(path: Path) -> int:
    """Sort the lines by shard and drop those of a shard that was begun twice; return how many are left."""
    if not path.exists():
        return 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    unique = sorted(
        {line["path"]: line for line in lines}.values(),
        key=lambda line: (line["shard"], line["path"]),
    )
    with atomic_write(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in unique)
    return len(unique)
