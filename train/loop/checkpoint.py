"""Checkpoints: complete, atomic, written beside the training, refused when they do not fit.

A checkpoint holds the model with its target, the optimiser, the loss scaler, the step, the position in the
data and the configuration. It needs no state of random generators: views, masks and order are functions of
(seed, epoch, sample), and the step itself draws nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmae.model.export.stored import (
    FORMAT,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
)
from cmae.pipeline.formats.atomic import atomic_write


class Checkpointer:
    """Writes checkpoints of one run from a background thread and deletes the old ones.

    Args:
        folder: Place of `step-00001000.pt` and its like.
        keep: Number of the newest ones that stay.
        keep_every: Period in steps of those that stay for good.
        warn: Function that takes a line about a checkpoint that could not be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self._warn = warn
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.partial"):  # of a run that was killed while writing
            leftover.unlink(missing_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Copy the state now, where it is, and write it in the background.

        A GPU's copy takes milliseconds and as much memory as the state; the way to the host is the writer's.
        A checkpoint that the disk refuses is a warning: older ones are still there, and the next is tried.
        """
        try:
            self.wait()
        except CheckpointError as error:
            self._warn(f"{error}; the run goes on, and the next checkpoint is tried")
        path = self.folder / f"step-{step:08d}.pt"
        snapshot = _map_tensors(_copy, {"format": FORMAT, "step": step, **state})
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        arguments = (path, snapshot, copied)
        self._writer = threading.Thread(target=self._write, args=arguments, daemon=False)
        self._writer.start()
        return path

    def wait(self) -> None:
        """Return once the last checkpoint is on the disk.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, path: Path, snapshot: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        try:
            write_atomically(path, _to_host(snapshot, copied))
            self._retire()
        # Raised again on the training thread, by wait().
        except (OSError, RuntimeError) as error:
            # torch's writer hides the system's error behind one of its own.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self._error = CheckpointError(
                f"{path} cannot be written: {getattr(cause, 'strerror', None) or cause}. Older checkpoints "
                "are as they were; make room, or check the file system of run.out",
                key=str(path),
            )
        except BaseException as error:
            self._error = error

    def _retire(self) -> None:
        for path in list_checkpoints(self.folder)[: -self.keep]:
            if not (self.keep_every and _step_of(path) % self.keep_every == 0):
                path.unlink()


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """Write, sync and rename: a reader sees the old file or the whole new one, whatever happens."""
    with atomic_write(path) as file:
        torch.save(state, file)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on file systems that can sync a folder (CIFS and FUSE may not)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `run.resume` means: None starts afresh.

    A file that a crash or a full disk has cut off is passed over for the newest whole one. After a start
    from a named file, the same command goes on with what it has written since.

    Raises:
        CheckpointError: The file is missing, every checkpoint is damaged, or 'never' meets a folder that
            holds checkpoints.
    """
    stored = list_checkpoints(folder)
    newest = max(stored, default=None)
    if resume == "auto":
        whole = next((path for path in reversed(stored) if is_whole(path)), None)
        if stored and whole is None:
            raise CheckpointError(
                f"{newest} and the {len(stored) - 1} checkpoints before it are cut off or damaged: restore "
                "one, or start afresh in another run.out",
                key="run.resume",
            )
        return whole
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


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has its end and no damaged part: torch writes a zip archive with checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    # zipfile raises many things over damaged bytes.
    except Exception:
        return False


def origin_of(resume: str, resumed: Mapping[str, Any] | None) -> str:
    """What a run's checkpoints note as `origin`: the file that `run.resume` named last, '' if it never did.

    Args:
        resume: Setting `run.resume` of this run.
        resumed: Checkpoint that it goes on from.
    """
    if resume not in ("auto", "never"):
        return str(Path(resume).resolve())
    return "" if resumed is None else resumed.get("origin", "")


def _newest_descendant(named: Path, stored: Sequence[Path]) -> Path | None:
    """The newest checkpoint, if it comes from the named file by way of `run.resume`."""
    newest = next((path for path in reversed(stored) if is_whole(path)), None)
    if newest is None or newest.resolve() == named.resolve():
        return None
    return newest if load_checkpoint(newest).get("origin") == str(named.resolve()) else None


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Move what a run passes over out of the way, so that names are the order of writing again.

    Args:
        folder: Folder of the run's checkpoints.
        step: Number of steps that the run begins after.

    Returns:
        New paths, in `set-aside` below the folder, of the checkpoints of later steps.
    """
    moved = []
    for path in list_checkpoints(folder):
        if _step_of(path) > step:
            place = folder / "set-aside"
            place.mkdir(exist_ok=True)
            names = chain([path.name], (f"{path.stem}.{number}.pt" for number in count(2)))
            target = next(place / name for name in names if not (place / name).exists())
            moved.append(path.rename(target))
    return moved


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder of checkpoints; the system lets go when the process ends, however.

    A file system without locks is used without one.

    Args:
        folder: Folder of the run's checkpoints; made if missing.

    Raises:
        CheckpointError: Another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run writes checkpoints to {folder}: stop it, or choose another run.out",
                key="run.out",
            ) from error
        except OSError:
            pass
        yield


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _copy(tensor: Tensor) -> Tensor:
    try:
        return tensor.detach().clone()
    except torch.OutOfMemoryError:
        return tensor.detach().to("cpu")  # waits for the device


def _to_host(snapshot: dict[str, Any], copied: torch.cuda.Event | None) -> dict[str, Any]:
    """The snapshot in host memory, beside what the device does meanwhile."""
    if copied is None:
        return snapshot
    stream = torch.cuda.Stream(copied.device)  # a new thread's own device is the first one
    stream.wait_event(copied)
    with torch.cuda.stream(stream):
        # Each copy waits for its own end, so the snapshot's memory is free when it is given back.
        moved: dict[str, Any] = _map_tensors(lambda tensor: tensor.to("cpu"), snapshot)
    return moved


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_tensors(function, item) for item in value]
    return value
