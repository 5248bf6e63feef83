"""A copy of a run in a store: checkpoints go there in the background; a node without any begins from it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from cmae.model.export.stored import CheckpointError, list_checkpoints
from cmae.pipeline.bad_samples import LEDGER_FILE
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.remote.client import RemoteConfig
from cmae.pipeline.remote.folder import RemoteFolder
from cmae.train.checkpoints.folder import Retention, fault_of, newest_whole, step_of

LISTING = "checkpoints.json"
"""What a mirror holds, written after the files: names, bytes, SHA-256."""

BESIDE = ("config.yaml", "metrics.jsonl", LEDGER_FILE)
"""Files of a run that go to the mirror with each checkpoint."""

_MAX_LISTING = 16 << 20
_MAX_BESIDE = 4 << 30
_DEADLINE_S = 1800.0
_PREFIX = ".mirror-"
"""Of files that are there to be sent."""


@dataclass(frozen=True)
class _Stored:
    """A checkpoint in the mirror."""

    name: str
    bytes: int
    sha256: str
    written: float
    """Time in seconds since 1970."""


class _Held(NamedTuple):
    """A checkpoint that is to be sent, and where it stays until then though the run may delete its own."""

    name: str
    path: Path

    @classmethod
    def of(cls, checkpoint: Path) -> _Held:
        """Hold it by a second link, or as it is where a file system has none."""
        link = checkpoint.with_name(f"{_PREFIX}{checkpoint.name}")
        link.unlink(missing_ok=True)
        try:
            os.link(checkpoint, link)
        except OSError:
            link = checkpoint
        return cls(checkpoint.name, link)

    def let_go(self) -> None:
        """Remove the link."""
        if self.path.name != self.name:
            self.path.unlink(missing_ok=True)


class Mirror:
    """Copies checkpoints and what belongs to them to a store, one at a time, the newest first.

    Args:
        folder: Folder of the store.
        out: Folder of the run.
        retention: Rule for which checkpoints stay there.
        warn: Function that takes a line about a copy that failed; from any thread.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        out: Path,
        *,
        retention: Retention,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._folder = folder
        self._out = out
        self._retention = retention
        self._warn = warn
        self._next: _Held | None = None
        self._condition = threading.Condition()
        self._is_closing = False
        for leftover in (out / "checkpoints").glob(f"{_PREFIX}*"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._run, name="cmae-mirror", daemon=True)
        self._thread.start()

    def put(self, checkpoint: Path) -> None:
        """Copy a checkpoint soon; one that still waits for the store is left out for it."""
        held = _Held.of(checkpoint)
        with self._condition:
            if self._next is not None:
                self._next.let_go()
            self._next = held
            self._condition.notify()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the newest copy arrive; after an error, end what is under way."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if error is not None:
            self._folder.close()
        self._thread.join(None if error is None else 10.0)
        self._folder.close()

    def _run(self) -> None:
        while True:
            with self._condition:
                while self._next is None and not self._is_closing:
                    self._condition.wait()
                held, self._next = self._next, None
            if held is None:
                return
            try:
                self._send(held.path, held.name)
            except BaseException as error:  # the run needs no mirror, and the next copy is tried
                self._warn(
                    f"{held.name} is not in {self._folder.shown}: {error}. It is in {self._out}, and the "
                    "next one is tried"
                )
            finally:
                held.let_go()

    def _send(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._folder.put(path, f"checkpoints/{name}")
        for beside in BESIDE:
            if (self._out / beside).exists():
                self._put_copy((self._out / beside).read_bytes(), beside)  # it grows meanwhile
        status = path.stat()
        before = read_listing(self._folder)
        # Those of later steps are of a branch that the run has left.
        stored = [one for one in before if one.name < name]
        stored.append(_Stored(name, status.st_size, digest, status.st_mtime))
        gone = [one for one in before if one.name > name]
        gone += [
            one
            for one in stored[: -self._retention.keep]
            if not self._retention.stays(_step(one), one.written)
        ]
        self._write_listing([one for one in stored if one not in gone])
        for one in gone:
            with suppress(RemoteError):  # it takes room, and nobody looks for it
                self._folder.remove(f"checkpoints/{one.name}")

    def _write_listing(self, stored: list[_Stored]) -> None:
        self._put_copy(json.dumps([vars(one) for one in stored], indent=1).encode(), LISTING)

    def _put_copy(self, data: bytes, name: str) -> None:
        path = self._out / "checkpoints" / f"{_PREFIX}{name}"
        try:
            path.write_bytes(data)
            self._folder.put(path, name)
        finally:
            path.unlink(missing_ok=True)


def open_mirror(url: str, storage_options: Any) -> RemoteFolder:
    """The folder that `run.mirror` means.

    Raises:
        CmaeError: It is no URL of a store, or its package is not installed.
    """
    return RemoteFolder(url, RemoteConfig(storage_options=storage_options, deadline_s=_DEADLINE_S))


def read_listing(folder: RemoteFolder) -> list[_Stored]:
    """Checkpoints that a mirror holds, oldest first.

    Raises:
        CheckpointError: The listing is damaged.
        RemoteError: The store cannot be reached.
    """
    content = folder.read(LISTING, limit=_MAX_LISTING)
    if content is None:
        return []
    try:
        stored = [_Stored(**one) for one in json.loads(content)]
        return sorted(stored, key=lambda one: (_step(one), one.name))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder.shown}/{LISTING} is damaged ({error}): remove it, and name the checkpoint to go on "
            "from with run.resume",
            key="run.mirror",
        ) from error


def fetch_newest(
    folder: RemoteFolder, out: Path, *, note: Callable[[str], None] = lambda line: None
) -> Path | None:
    """Bring the newest checkpoint of a mirror here, if it is newer than all that are here and whole.

    Args:
        folder: Folder of the store.
        out: Folder of the run, which this run holds.
        note: Called with a line for what was done.

    Returns:
        The checkpoint that came; None where none did.

    Raises:
        CheckpointError: Nothing is here, and the mirror cannot be read: a start would lose what it holds.
    """
    place = out / "checkpoints"
    here = newest_whole(list_checkpoints(place))
    newest = -1 if here is None else step_of(here)
    try:
        stored = [one for one in read_listing(folder) if _step(one) > newest]
        for one in reversed(stored):
            path = place / one.name
            place.mkdir(parents=True, exist_ok=True)
            if folder.get(f"checkpoints/{one.name}", path) == one.sha256 and not fault_of(path):
                _fetch_beside(folder, out)
                note(f"fetched {one.name} from {folder.shown}")
                return path
            path.unlink(missing_ok=True)
            note(f"{folder.shown}/checkpoints/{one.name} is damaged, and passed over")
    except RemoteError as error:
        if here is None:
            raise CheckpointError(
                f"run.mirror cannot be read, and {place} holds no checkpoint, so that a start would begin at "
                f"step 0: {error}",
                key="run.mirror",
            ) from error
        note(f"run.mirror cannot be read, and the run goes on from {here.name}: {error}")
        return None
    if stored:
        raise CheckpointError(
            f"all {len(stored)} newer checkpoints of {folder.shown} are damaged: remove {LISTING} there to "
            "go on without them",
            key="run.mirror",
        )
    return None


def _fetch_beside(folder: RemoteFolder, out: Path) -> None:
    """What the run has written so far, where this node has nothing of it."""
    for name in BESIDE:
        if (out / name).exists():
            continue
        content = folder.read(name, limit=_MAX_BESIDE)
        if content is not None:
            with atomic_write(out / name) as file:
                file.write(content)


def _step(stored: _Stored) -> int:
    return step_of(Path(stored.name))
