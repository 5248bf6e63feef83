"""One run in a folder at a time, also where the nodes of a cluster do not see each other's file locks."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cmae.model.export.stored import CheckpointError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.printable import printable

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""How often the holder of a folder writes that it is there."""

WATCH_S = 20.0
"""How long a newcomer watches a holder on another machine before it counts as gone."""

_HOLDER = ".holder"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder of checkpoints, until the process ends, however it does.

    On one machine the system's file lock tells at once. On a network file system it may be seen by one node
    alone, or not exist: so the holder also writes a line that changes every few seconds, and who finds the
    line of another machine watches whether it still does. No clocks are compared.

    Args:
        folder: Folder of the run's checkpoints; made if missing.

    Raises:
        CheckpointError: Another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_lock = True
        except BlockingIOError as error:
            raise _is_held(folder, _read(folder / _HOLDER)) from error
        except OSError:
            has_lock = False  # the file system has none
        holder = folder / _HOLDER
        _wait_for_news(holder, folder, trusts_own=has_lock)
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(holder, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            with suppress(OSError):
                holder.unlink(missing_ok=True)


def machine() -> str:
    """This machine and its boot: what shares the system's file locks."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = "-"
    return f"{socket.gethostname()} {boot}"


def _beat(holder: Path, stop: threading.Event) -> None:
    """Rewrite the holder's line until the run ends; a disk that refuses it is asked again."""
    token = secrets.token_hex(8)
    for number in range(1 << 62):
        with suppress(OSError), atomic_write(holder) as file:
            file.write(f"{machine()} {os.getpid()} {token} {number}\n".encode())
        if stop.wait(BEAT_S):
            return


def _wait_for_news(holder: Path, folder: Path, *, trusts_own: bool) -> None:
    """Return once nobody else holds the folder.

    Raises:
        CheckpointError: The holder's line changes while it is watched.
    """
    first = _read(holder)
    if not first or (trusts_own and _boot_of(first) == _boot_of(machine())):
        return  # a process of this machine would have the lock
    logger.warning(
        "%s was held by a run on another machine (%s): waiting %.0f s to see whether it still is",
        folder,
        printable(first.split()[0]),
        WATCH_S,
    )
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 10))
        now = _read(holder)
        if not now:
            return
        if now != first:
            raise _is_held(folder, now)


def _boot_of(line: str) -> str:
    return [*line.split(), "", ""][1]


def _read(holder: Path) -> str:
    try:
        return holder.read_bytes()[:1000].decode(errors="replace")
    except OSError:
        return ""


def _is_held(folder: Path, line: str) -> CheckpointError:
    words = [printable(word) for word in line.split()]
    who = f" (process {words[2]} on {words[0]})" if len(words) > 2 else ""
    return CheckpointError(
        f"another run{who} writes checkpoints to {folder}: stop it, or choose another run.out",
        key="run.out",
    )
