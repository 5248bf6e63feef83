"""Checkpoints in shards: every rank writes its part, beside the training; a file at the end names them."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from cmae.model.export.shards import METADATA, SHARDS, reason_of, shards_of
from cmae.model.export.stored import FORMAT, CheckpointError
from cmae.train.checkpoints.digest import file_digest
from cmae.train.checkpoints.folder import Retention, retire
from cmae.train.checkpoints.writer import (
    map_tensors,
    sync_folder,
    write_checkpoint,
    write_fault,
)
from cmae.train.distributed import World


class ShardedCheckpointer:
    """Writes checkpoints whose tensors lie in a folder beside them, one file a rank.

    On every rank. The tensors are copied where they are and written by a thread with messages of its own. The
    file `step-00001000.pt`, with everything else and the shards' SHA-256, comes last: without it there is no
    checkpoint. A write that fails is told, and the next one is the next attempt; where none has succeeded
    for `patience_s`, the run ends.

    Args:
        folder: Place of the checkpoints, which all ranks see.
        world: Ranks that take part.
        retention: Rule for which of them stay.
        patience_s: Longest time from the first write that fails to one that succeeds.
        warn: Function that takes a line about a checkpoint that could not be written; from any thread.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        retention: Retention | None = None,
        patience_s: float = 3600.0,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.last_s: float | None = None
        """Seconds that the last checkpoint took on its way to the disk, beside the training."""
        self._world = world
        self._retention = retention or Retention()
        self._patience_s = patience_s
        self._warn = warn
        self._group: Any = dist.new_group(backend="gloo") if world.world_size > 1 else None
        self._writer: threading.Thread | None = None
        self._fails_since: float | None = None
        self._fault: CheckpointError | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("step-*.shards"):  # of a run that was killed while writing
                if not leftover.with_suffix(".pt").exists():
                    warn(
                        f"deleted {leftover}, half of a checkpoint: its file, which comes last, is not there"
                    )
                    shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        """Copy this rank's tensors now, and write them in the background; waits for the write before.

        Args:
            step: Number of steps taken.
            state: Everything else that a checkpoint holds; of the first rank.
            tensors: This rank's parts of weights and moments, by name.

        Raises:
            CheckpointError: None could be written for `patience_s`.
        """
        self.wait()
        path = self.folder / f"step-{step:08d}.pt"
        copies = {name: value.detach().clone() for name, value in tensors.items()}
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        on_host = map_tensors(lambda one: one.detach().to("cpu", copy=True), state)
        state = {"format": FORMAT, "step": step, **on_host}
        self._writer = threading.Thread(
            target=self._write, args=(path, state, copies, copied), daemon=True
        )
        self._writer.start()
        return path

    def wait(self) -> None:
        """Return once the last checkpoint is on the disk.

        Raises:
            CheckpointError: None could be written for `patience_s`.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.join()
        if self._fault is None:
            self._fails_since = None
            return
        fault, self._fault, now = self._fault, None, time.monotonic()
        self._fails_since = self._fails_since or now
        if now - self._fails_since >= self._patience_s:
            raise fault
        if self._world.is_main:
            self._warn(f"{fault}. The run goes on, and the next checkpoint is the next attempt")

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let a write under way come to its end, unless another rank is gone, which it would wait for."""
        if error is None and self._writer is not None:
            self._writer.join()

    def _write(
        self,
        path: Path,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
        copied: torch.cuda.Event | None,
    ) -> None:
        begun = time.monotonic()
        try:
            if copied is not None:
                copied.synchronize()
            writer = FileSystemWriter(shards_of(path), sync_files=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                save(
                    tensors,
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=self._group is None,
                )
            listed = self._digests(shards_of(path))
            if self._world.is_main:
                sync_folder(shards_of(path))
                write_checkpoint(path, {**state, SHARDS: listed})
                retire(self.folder, self._retention)
                self.last_s = time.monotonic() - begun
        # torch wraps what a disk or a file says in errors of its own.
        except Exception as error:
            self._fault = write_fault(path, reason_of(error))

    def _digests(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file, each computed by the rank that wrote it. A collective."""
        rank = self._world.rank
        mine = sorted(folder.glob(f"__{rank}_*")) + ([folder / METADATA] if rank == 0 else [])
        found = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in mine
        }
        if self._group is None:
            return found
        parts: list[Any] = [None] * self._world.world_size
        dist.all_gather_object(parts, found, group=self._group)
        return {name: value for part in parts for name, value in part.items()}
