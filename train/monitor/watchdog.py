"""Ends a run that no longer moves, once it has said which rank stands where: nobody waits for a human."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from cmae.errors import CmaeError
from cmae.printable import MAX_LINE, printable
from cmae.train.monitor.status import EVERY_S, RunStatus, read_status

HUNG = 75
"""Exit code: start it again, as after a stop; the last checkpoint is whole."""

STARTING = "starting"
WAITS = ("waiting for the data of other ranks", "in the step")
"""What a rank does that may wait for others."""

_TICK_S = 1.0
_STEPS = 10
"""A step may take this many times the longest one so far."""
_SILENT_S = 5 * EVERY_S


class Watchdog:
    """Watches one rank from a thread of its own.

    Every rank has one, so that all that can still speak do: a rank that is stopped or dead is named by the
    others, which see that its status grows old.

    Args:
        out: Folder of the run, where the ranks' status lies.
        rank: Number of this process.
        limit_s: Longest time without a step, or ten times the longest step if that is more; None: no limit.
        end: Ends this process.
    """

    def __init__(
        self,
        out: Path,
        rank: int,
        *,
        limit_s: float | None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.doing = STARTING
        """What the rank does; set by the loop, read by its status."""
        self._out, self._rank, self._end = out, rank, end
        self._limit_s = limit_s
        self._moved_at: float | None = None
        self._longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cmae-watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Start watching; time counts from the first step on, as that one compiles."""
        if self._limit_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self._stop.set()

    def moved(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._moved_at is not None:
            self._longest_s = max(self._longest_s, now - self._moved_at)
        self._moved_at = now

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Time for work that is no step, such as an evaluation: it counts for nothing."""
        before, self.doing, self._moved_at = self.doing, doing, None
        try:
            yield
        finally:
            self.doing, self._moved_at = before, time.monotonic()

    def rest(self, doing: str) -> None:
        """No step comes any more: what is left may take its time."""
        self.doing, self._moved_at = doing, None

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            moved_at = self._moved_at
            if moved_at is not None and now - last > 5 * _TICK_S:
                # Stopped, as by Ctrl-Z, and continued.
                self._moved_at = moved_at = moved_at + now - last
            last = now
            limit_s = max(self._limit_s or 0.0, _STEPS * self._longest_s)
            if moved_at is not None and now - moved_at > limit_s:
                self._report(now - moved_at)
                self._end(HUNG)
                return

    def _report(self, hung_s: float) -> None:
        """Print who stands where, and write every thread's stack and NCCL's record of collectives."""
        with suppress(CmaeError, OSError):
            lines = explain(read_status(self._out))
            text = "\n  ".join(printable(line, limit=MAX_LINE) for line in lines)
            _print(
                f"cmae pretrain: no step for {hung_s:.0f} s (run.hang_s), seen by rank {self._rank}\n  {text}"
            )
        folder = self._out / "hang"
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            with (folder / f"rank-{self._rank:04d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        with suppress(Exception):  # torch's own, and only there with NCCL
            from torch._C import _distributed_c10d

            record = _distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            (folder / f"nccl-{self._rank:04d}.pkl").write_bytes(record)
        _print(f"  stacks: {folder}; ending with exit code {HUNG}: the same command continues")


def explain(ranks: Sequence[RunStatus]) -> list[str]:
    """Lines for people: first the ranks that keep the others, then what those others do.

    Args:
        ranks: Status of every rank that has written one.
    """
    newest = max(one.time for one in ranks)
    silent = [one for one in ranks if newest - one.time > _SILENT_S]
    behind = [one for one in ranks if one not in silent and one.doing not in WAITS]
    first = [
        f"rank {one.rank} ({one.host}, process {one.pid}) has been silent for {newest - one.time:.0f} s: "
        f"stopped, killed, or its machine is gone; its last step was {one.step}"
        for one in silent
    ]
    first += [
        f"rank {one.rank} ({one.host}, process {one.pid}) is {one.doing} after step {one.step}"
        for one in behind
    ]
    others: dict[tuple[str, int], list[int]] = {}
    for one in ranks:
        if one not in silent and one not in behind:
            others.setdefault((one.doing, one.step), []).append(one.rank)
    first += [
        f"{'rank' if len(numbers) == 1 else 'ranks'} {_ranges(numbers)}: {doing} after step {step}"
        for (doing, step), numbers in others.items()
    ]
    missing = sorted({*range(ranks[0].world_size)} - {one.rank for one in ranks})
    return first + ([f"ranks {_ranges(missing)} have written no status"] if missing else [])


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 5: consecutive numbers together."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _print(text: str) -> None:
    """Past Python's own streams, whose lock the thread that hangs may hold."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, (text + "\n").encode())
