"""A folder of checkpoints: which one a run goes on from, which are set aside and why, which are retired."""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from cmae.model.export.shards import SHARDS, shards_of
from cmae.model.export.stored import (
    CheckpointError,
    ForeignFileError,
    has_step_name,
    list_checkpoints,
    load_checkpoint,
)
from cmae.train.checkpoints.digest import DIGEST, content_digest, file_digest

SET_ASIDE = "set-aside"
"""Folder, beside the checkpoints, of those that no run goes on from; nothing deletes them."""

WHY_FILE = "why.txt"

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep: int = 3
    """Number of the newest that stay."""
    keep_every: int | None = None
    """Period in steps of those that stay for good."""
    keep_hours: float | None = None
    """Age up to which all stay."""

    def retired(self, paths: Sequence[Path], *, now: float | None = None) -> list[Path]:
        """Those that may go, of checkpoints in the order of their steps.

        Args:
            paths: All of a run's checkpoints, oldest first.
            now: Time in seconds since 1970; None: the present.
        """
        older = [path for path in paths[: -self.keep] if path.exists()]
        return [path for path in older if not self.stays(step_of(path), path.stat().st_mtime, now)]

    def stays(self, step: int, written: float, now: float | None = None) -> bool:
        """Whether a checkpoint stays that is not one of the newest.

        Args:
            step: Its step.
            written: Time in seconds since 1970.
            now: The present; None: as the system has it.
        """
        if self.keep_every and step % self.keep_every == 0:
            return True
        now = time.time() if now is None else now
        return self.keep_hours is not None and now - written <= 3600 * self.keep_hours


def fault_of(path: Path) -> str:
    """Why nothing can go on from a checkpoint: cut off, damaged or not one of ours; '' where it is whole.

    Raises:
        CheckpointError: The file cannot be read, which says nothing about what it holds.
    """
    try:
        with open(path, "rb") as file:
            while file.read(_CHUNK):
                pass
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): give this user the right to, or have the "
            "disk looked at. An older checkpoint is not taken for it, as that would lose steps",
            key="run.resume",
        ) from error
    try:
        state = load_checkpoint(path, whole=False)
    except ForeignFileError:
        return "not of this program"
    except CheckpointError:
        return "cut off or damaged"
    if has_step_name(path) and state.get("step") != step_of(path):
        return f"named otherwise than its step, {state.get('step')!r}"
    if DIGEST not in state:  # of an earlier version
        return "" if _is_good_zip(path) else "cut off or damaged"
    if state[DIGEST] != content_digest(state):
        return "damaged: its contents do not have the digest that was written with them"
    return _fault_of_shards(path, state.get(SHARDS, {}))


def _fault_of_shards(path: Path, listed: Mapping[str, Mapping[str, Any]]) -> str:
    """Which shard is missing or damaged; '' where all are whole, or there are none."""
    folder = shards_of(path)
    for name, one in listed.items():
        file = folder / name
        try:
            if file.stat().st_size != one["bytes"]:
                return f"damaged: {folder.name}/{name} is not as long as it was written"
            if file_digest(file) != one["sha256"]:
                return f"damaged: {folder.name}/{name} does not have the digest that was written"
        except FileNotFoundError:
            return f"incomplete: {folder.name}/{name} is missing"
    return ""


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, and its shards where it has some."""
    path.unlink(missing_ok=True)
    shutil.rmtree(shards_of(path), ignore_errors=True)


def retire(folder: Path, retention: Retention) -> None:
    """Delete the checkpoints of a folder that no rule keeps."""
    for path in retention.retired(list_checkpoints(folder)):
        remove_checkpoint(path)


def size_of(path: Path) -> int:
    """Bytes of a checkpoint, with its shards."""
    shards = shards_of(path)
    files = [one for one in shards.iterdir() if one.is_file()] if shards.is_dir() else []
    return sum(one.stat().st_size for one in (path, *files))


def newest_whole(stored: Sequence[Path]) -> Path | None:
    """The last of these checkpoints that is whole; None where none is. Older ones are not looked at.

    Raises:
        CheckpointError: See `fault_of`.
    """
    return next((path for path in reversed(stored) if not fault_of(path)), None)


def _is_good_zip(path: Path) -> bool:
    """Whether the archive that torch writes has its end and its checksums fit: torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises many things over damaged bytes
        return False


def find_checkpoint(
    resume: str, folder: Path, *, note: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The checkpoint that `run.resume` means: None starts afresh.

    With 'auto', newer ones that are cut off, damaged or foreign are set aside for the newest whole one. After
    a start from a named file, the same command goes on with what it has written since.

    Args:
        resume: Setting `run.resume`.
        folder: Folder of the run's checkpoints, which this run holds.
        note: Called with a line for each file that is set aside.

    Raises:
        CheckpointError: The file is missing or cannot be read, every checkpoint is damaged, or 'never' meets
            a folder that holds checkpoints.
    """
    stored = list_checkpoints(folder)
    newest = max(stored, default=None)
    if resume == "auto":
        return _newest_whole(stored, note)
    if resume == "never":
        if newest is not None:
            raise CheckpointError(
                f"run.resume is 'never', but {newest} exists; choose another run.out, delete the "
                "folder, or set run.resume=auto to continue it"
            )
        return None
    path = Path(resume)
    if not path.is_file():
        raise CheckpointError(
            f"run.resume is {resume!r}: there is no such file; it must be 'auto', 'never' or the "
            f"path of a checkpoint (the newest in {folder}: {newest})"
        )
    return _newest_descendant(path, stored) or path


def _newest_whole(stored: Sequence[Path], note: Callable[[str], None]) -> Path | None:
    faults: list[tuple[Path, str]] = []
    for path in reversed(stored):
        fault = fault_of(path)
        if not fault:
            for one, why in faults:
                note(f"set aside, {why}: {set_aside(one, why)}; the run goes on from {path.name}")
            return path
        faults.append((path, fault))
    if stored:
        raise CheckpointError(
            f"{stored[-1]} and the {len(stored) - 1} checkpoints before it are cut off or damaged: restore "
            "one, or start afresh in another run.out",
            key="run.resume",
        )
    return None


def _newest_descendant(named: Path, stored: Sequence[Path]) -> Path | None:
    """The newest checkpoint, if it comes from the named file by way of `run.resume`."""
    newest = newest_whole(stored)
    if newest is None or newest.resolve() == named.resolve():
        return None
    state = load_checkpoint(newest, whole=False)
    return newest if state.get("origin") == str(named.resolve()) else None


def origin_of(resume: str, resumed: Mapping[str, Any] | None) -> str:
    """What a run's checkpoints note as `origin`: the file that `run.resume` named last, '' if it never did.

    Args:
        resume: Setting `run.resume` of this run.
        resumed: Checkpoint that it goes on from.
    """
    if resume not in ("auto", "never"):
        return str(Path(resume).resolve())
    return "" if resumed is None else resumed.get("origin", "")


def set_aside(path: Path, why: str) -> Path:
    """Move a checkpoint out of the way of its run, and write down why; return its new path."""
    place = path.parent / SET_ASIDE
    place.mkdir(exist_ok=True)
    names = chain([path.name], (f"{path.stem}.{number}.pt" for number in count(2)))
    target = next(place / name for name in names if not (place / name).exists())
    moved = path.rename(target)
    with suppress(FileNotFoundError):
        shards_of(path).rename(shards_of(target))
    with suppress(OSError), (place / WHY_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {target.name}: {why}\n")
    return moved


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Move what a run passes over out of the way, so that names are the order of writing again.

    Args:
        folder: Folder of the run's checkpoints.
        step: Number of steps that the run begins after.

    Returns:
        New paths of the checkpoints of later steps.
    """
    return [
        set_aside(path, f"a run began after step {step}, and does not come from it")
        for path in list_checkpoints(folder)
        if step_of(path) > step
    ]


def step_of(path: Path) -> int:
    """Number of steps in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))
