"""Checkpoints: complete, atomic, written beside the training, tried again where a disk refuses them.

A checkpoint holds the model with its target, the optimiser, the loss scaler, the step, the position in the
data, the configuration and a digest of all that. It needs no state of random generators: views, masks and
order are functions of (seed, epoch, sample), and the step itself draws nothing.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cmae.model.export.stored import FORMAT, CheckpointError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.checkpoints.digest import DIGEST, content_digest
from cmae.train.checkpoints.folder import Retention, retire

RETRY_S = 60.0
"""After a write that failed; the fault is told each time."""

STALL_S = 30.0
"""Longest time that the training waits for the write before, where its storage hangs."""


class _Snapshot(NamedTuple):
    """The state of a step, still where it was copied."""

    path: Path
    state: dict[str, Any]
    copied: torch.cuda.Event | None


class Checkpointer:
    """Writes checkpoints of one run from a background thread and deletes the old ones.

    A write that the disk refuses is tried again every minute, with the newest snapshot, while the training
    goes on and older checkpoints stay. Where nothing could be written for `patience_s`, the run ends.

    Args:
        folder: Place of `step-00001000.pt` and its like.
        retention: Rule for which of them stay.
        patience_s: Longest time from the first write that fails to one that succeeds.
        warn: Function that takes a line about a checkpoint that could not be written; from any thread.
        written: Function that is called with each checkpoint that was written, from the background thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention | None = None,
        patience_s: float = 3600.0,
        warn: Callable[[str], None] = print,
        written: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder = folder
        self.retention = retention or Retention()
        self._patience_s = patience_s
        self.last_s: float | None = None
        """Seconds that the last checkpoint took on its way to the disk, beside the training."""
        self._warn = warn
        self._written = written
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._fails_since: float | None = None
        self._newer: _Snapshot | None = None
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.partial"):  # of a run that was killed while writing
            leftover.unlink(missing_ok=True)

    def save(self, step: int, state: dict[str, Any], *, is_copy: bool = False) -> Path:
        """Copy the state now, where it is, and write it in the background.

        A GPU's copy takes milliseconds and as much memory as the state; the way to the host is the writer's.
        While the write before it hangs or fails, this one takes its place as soon as it may.

        Args:
            step: Number of steps taken.
            state: All that the checkpoint holds.
            is_copy: Whether nothing changes the state's tensors any more, so that they need no copy.

        Raises:
            CheckpointError: Nothing could be written for `patience_s`.
        """
        path = self.folder / f"step-{step:08d}.pt"
        state = {"format": FORMAT, "step": step, **state}
        if not is_copy:
            state = map_tensors(_copy, state)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        snapshot = _Snapshot(path, state, copied)
        before = self._writer
        if self._fails_since is None and before is not None:
            before.join(STALL_S)
        with self._lock:
            self._raise_error()
            if self._writer is not None:
                if self._fails_since is None:
                    self._warn(
                        f"the write before {path.name} has taken more than {STALL_S:.0f} s: the storage of "
                        f"{self.folder} hangs. The run goes on, and {path.name} is written next"
                    )
                self._newer = snapshot
                return path
            self._writer = threading.Thread(target=self._write, args=(snapshot,), daemon=False)
            self._writer.start()
        return path

    def wait(self) -> None:
        """Return once the last checkpoint is on the disk; failed writes are tried again meanwhile.

        Raises:
            CheckpointError: It could not be written for `patience_s`.
        """
        writer = self._writer
        if writer is not None:
            writer.join()
        self._raise_error()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let a write under way come to its end; after an error, one that fails is not tried again."""
        if error is not None:
            self._patience_s = 0.0
            self._hurry.set()
        writer = self._writer
        if writer is not None:
            writer.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: _Snapshot) -> None:
        """Write a snapshot, or the newer one that came meanwhile, until it is there."""
        try:
            while True:
                fault = self._try(snapshot)
                with self._lock:
                    if self._newer is not None:
                        snapshot, self._newer = self._newer, None
                    elif fault is None:
                        self._writer = None
                        return
                if fault is not None and not self._may_try_again(fault):
                    raise fault
        except BaseException as error:  # raised again on the training thread
            with self._lock:
                self._error, self._writer = error, None

    def _try(self, snapshot: _Snapshot) -> CheckpointError | None:
        """Write and retire; return what was in the way."""
        path, begun = snapshot.path, time.monotonic()
        try:
            state = _to_host(snapshot.state, snapshot.copied)
            write_checkpoint(path, state)
            retire(self.folder, self.retention)
        except (OSError, RuntimeError) as error:
            # torch's writer hides the system's error behind one of its own.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            return write_fault(path, getattr(cause, "strerror", None) or cause)
        self._fails_since = None
        self.last_s = time.monotonic() - begun
        self._written(path)
        return None

    def _may_try_again(self, fault: CheckpointError) -> bool:
        """Warn and wait; False where the patience is at its end."""
        now = time.monotonic()
        if self._fails_since is None:
            self._fails_since = now
        left_s = self._fails_since + self._patience_s - now
        if left_s <= 0:
            return False
        self._warn(
            f"{fault}. The run goes on, and this is tried again every {RETRY_S:.0f} s for another "
            f"{left_s / 60:.0f} min before it ends"
        )
        self._hurry.wait(min(RETRY_S, left_s))
        return True


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint with the digest of what it holds, as `write_atomically` does."""
    write_atomically(path, {**state, DIGEST: content_digest(state)})


def write_fault(path: Path, reason: object) -> CheckpointError:
    """What to say of a checkpoint that was refused."""
    return CheckpointError(
        f"{path} cannot be written: {reason}. Older checkpoints are as they were; make room, or check the "
        "file system of run.out",
        key=str(path),
    )


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
        moved: dict[str, Any] = map_tensors(lambda tensor: tensor.to("cpu"), snapshot)
    return moved


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Nested dicts and lists with a function's result for every tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_tensors(function, item) for item in value]
    return value
