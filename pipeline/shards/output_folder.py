"""The folder that an offline tool writes: claimed, resumable, finished or not."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmae.errors import CmaeError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.dataset_folder import DATASET_FILE, DIGESTS_FILE, read_dataset
from cmae.pipeline.formats.shard_index import ShardIndex, StaleIndexError, index_path, load_index
from cmae.printable import MAX_LINE, printable

logger = logging.getLogger(__name__)


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or refuse one with shards that these settings did not write.

    Raises:
        CmaeError: It holds shards of another tool, source or setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = out / DATASET_FILE
    if summary.exists():
        before = read_dataset(summary).get("settings", {})
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            what = ", ".join(
                "the source"
                if name.startswith("source")
                else f"{name}: {before.get(name)} -> {settings[name]}"
                for name in changed
            )
            raise CmaeError(
                f"{out} holds shards of another source or settings ({what}): use the same again "
                "to continue, remove the folder, or write to another one"
            )
    elif foreign := sorted(out.glob("*.tar")):
        raise CmaeError(
            f"{out} holds {len(foreign)} tar file(s) such as {foreign[0].name} and no {DATASET_FILE}: "
            "write to a folder of its own"
        )


def remove_leftovers(tars: Iterable[Path]) -> None:
    """Remove what a killed run left half written of these shards; others may be at work beside them."""
    for tar in tars:
        for name in (tar.name, index_path(tar).name):
            for leftover in tar.parent.glob(f".{glob.escape(name)}.*.partial"):
                leftover.unlink(missing_ok=True)


def mark_begun(out: Path, settings: dict[str, Any]) -> None:
    """Write down that shards of these settings are being written."""
    write_json(out / DATASET_FILE, {"complete": False, "settings": settings})


def mark_complete(out: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write down that every shard is there, and what they hold together."""
    write_json(out / DATASET_FILE, {"complete": True, **facts, "settings": settings})


def write_digests(out: Path, shards: Iterable[tuple[Path, ShardIndex]]) -> None:
    """Write the digests of finished shards, taken as they were written, for `sha256sum -c`."""
    with atomic_write(out / DIGESTS_FILE) as listing:
        for tar, index in shards:
            digest = index.tar_sha256
            if not digest:  # indexed again since, or by an earlier version
                with open(tar, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            listing.write(f"{digest.hex()}  {tar.name}\n".encode())


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
        CmaeError: Fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CmaeError(
            f"the shards still to be written need {needed / 2**30:.1f} GiB and {out} has "
            f"{free / 2**30:.1f} GiB free: make room, or write to another disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _parse_skipped(line: bytes) -> dict[str, Any] | None:
    """A line of the skipped files; None where a kill cut it off."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    kinds = {"shard": int, "path": str, "reason": str}
    is_whole = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    return found if is_whole else None


def tidy_skipped(path: Path) -> list[dict[str, Any]]:
    """Sort the lines by shard and drop those of a shard that was begun twice; return those that are left.

    Lists that parts wrote beside it are taken in and removed. Damaged lines are counted in a warning: the
    shards themselves say what is in them.
    """
    # Parts first: what vanishes before it is read was taken in by another process, and is in `path` then.
    parts = sorted(path.parent.glob(f"{path.stem}.*-of-*{path.suffix}"))
    stored = []
    for source in (*parts, path):
        with contextlib.suppress(FileNotFoundError):
            stored += [line for line in source.read_bytes().split(b"\n") if line.strip()]
    if not stored and not path.exists():
        return []
    lines = [one for line in stored if (one := _parse_skipped(line))]
    if len(lines) < len(stored):
        shown = printable(str(path), limit=MAX_LINE)
        logger.warning("%s: %d damaged line(s) left out", shown, len(stored) - len(lines))
    unique = sorted(
        {line["path"]: line for line in lines}.values(),
        key=lambda line: (line["shard"], line["path"]),
    )
    with atomic_write(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in unique)
    for taken_in in parts:
        taken_in.unlink(missing_ok=True)
    return unique
