"""What a running job reports of itself, for `cmae top`: a small file a rank, rewritten every two seconds.

A background thread writes it, not the training loop: storage that hangs does not stop the run, and a step
that hangs does not stop the file, so that a reader can tell a stuck run from a dead one. The loop itself only
sets two numbers a step; docs/design/0016-reports.md says what that costs.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cmae.errors import CmaeError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.remote.schemes import redact
from cmae.pipeline.stage_stats import LoaderSnapshot

if TYPE_CHECKING:
    # `cmae top` reads without torch.
    from cmae.train.distributed import World

EVERY_S = 2.0
_WINDOW_S = 10.0
"""Rates are means over this time, or over the last step where that took longer."""
_FORMAT = 1


@dataclass(frozen=True)
class RunStatus:
    """One rank at one moment."""

    rank: int
    world_size: int
    host: str
    pid: int
    device: str
    state: str
    """running, finished, stopped (before the end, on request), or failed."""
    time: float
    """Unix time of writing."""
    step: int
    total_steps: int
    global_batch_size: int
    step_age_s: float
    """Since the last step was done."""
    step_ms: float | None
    """Mean over the window; None before the second step."""
    loss: float | None
    """Of the last record, mean over all ranks."""
    window: LoaderSnapshot
    gpu: dict[str, float] = field(default_factory=dict)
    error: str = ""
    """Why it failed."""
    format: int = _FORMAT

    @property
    def wait_share(self) -> float:
        """Share of the window in which the loop waited for data, 0 to 1."""
        return self.window.wait_s / self.window.time_s if self.window.time_s > 0 else 0.0

    @property
    def images_per_s(self) -> float | None:
        """Over all ranks."""
        return None if self.step_ms is None else 1000 * self.global_batch_size / self.step_ms

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the old file or the new one."""
        content = vars(self) | {"window": self.window.to_dict()}
        with atomic_write(path) as file:
            file.write(json.dumps(content).encode())


def status_folder(out: Path) -> Path:
    """Where the ranks of a run write."""
    return out / "live"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: `0:05:30`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def read_status(out: Path) -> list[RunStatus]:
    """The status of every rank of a run, by rank.

    Raises:
        CmaeError: no rank has written one, or another version has.
    """
    paths = sorted(status_folder(out).glob("rank-*.json"))
    if not paths:
        raise CmaeError(
            f"{out} holds no live/rank-*.json; name the folder (run.out) of a run that has been started"
        )
    return [_load(path) for path in paths]


def _load(path: Path) -> RunStatus:
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format") != _FORMAT:
        raise CmaeError(
            f"{path} has format {values.get('format')}, this version reads {_FORMAT}; "
            "use the version that runs the job"
        )
    return RunStatus(**{**values, "window": LoaderSnapshot.from_dict(values["window"])})


class _Mark(NamedTuple):
    """The counters at one moment."""

    time: float
    step: int
    step_at: float
    """When that step was done."""
    loader: LoaderSnapshot


class StatusPublisher:
    """Writes this rank's status while it is open.

    Args:
        out: Folder of the run, on storage that `cmae top` sees too.
        world: This process among all.
        step: Step that the run begins after.
        total_steps: Length of the schedule.
        global_batch_size: Images of a step over all ranks.
        snapshot: Function that reads the loader's counters.
        read_gpu: Function that reads the load of this rank's GPU, where there is one.
        every_s: Seconds between two writings.
    """

    def __init__(
        self,
        out: Path,
        world: World,
        *,
        step: int,
        total_steps: int,
        global_batch_size: int,
        snapshot: Callable[[], LoaderSnapshot],
        read_gpu: Callable[[], dict[str, float]] = dict,
        every_s: float = EVERY_S,
    ) -> None:
        self.loss: float | None = None
        """Set by the loop when it has read one from the device."""
        self.error: OSError | None = None
        """Why nothing is written any more; the run goes on."""
        self._path = status_folder(out) / f"rank-{world.rank:04d}.json"
        self._world, self._total_steps = world, total_steps
        self._global_batch_size = global_batch_size
        self._snapshot, self._read_gpu, self._every_s = snapshot, read_gpu, every_s
        # One assignment: the other thread sees both or none.
        self._last = (step, time.perf_counter())
        self._first: _Mark | None = None
        self._marks: deque[_Mark] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cmae-status", daemon=True)

    def __enter__(self) -> Self:
        """Remove what an earlier run with more ranks left, and start writing."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._world.is_main:
                for path in self._path.parent.glob("rank-*.json"):
                    if int(path.stem.removeprefix("rank-")) >= self._world.world_size:
                        path.unlink()
        except OSError as error:
            self.error = error
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write how it ended."""
        self._stop.set()
        # Storage that hangs must not keep the process.
        self._thread.join(timeout=5.0)
        if self._thread.is_alive():
            return
        if kind is not None:
            self._publish("failed", redact(f"{kind.__name__}: {error}"))
        else:
            self._publish("finished" if self._last[0] >= self._total_steps else "stopped")

    def step(self, step: int) -> None:
        """Note that a step is done."""
        now = time.perf_counter()
        self._last = (step, now)
        if self._first is None:
            # Windows begin here: the first step compiles and fills caches.
            self._first = _Mark(now, step, now, self._snapshot())

    def _run(self) -> None:
        self._publish("running")
        while not self._stop.wait(self._every_s):
            self._publish("running")

    def _publish(self, state: str, error: str = "") -> None:
        if self.error is not None:
            return
        try:
            self._status(state, error).save(self._path)
        except OSError as failure:
            self.error = failure

    def _status(self, state: str, error: str) -> RunStatus:
        # Looked at first: a mark from before the first step must not come after it.
        first = self._first
        now = _Mark(time.perf_counter(), *self._last, self._snapshot())
        before = self._window_start(first, now) if first else None
        steps = now.step - before.step if before else 0
        return RunStatus(
            rank=self._world.rank,
            world_size=self._world.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self._world.device),
            state=state,
            time=time.time(),
            step=now.step,
            total_steps=self._total_steps,
            global_batch_size=self._global_batch_size,
            step_age_s=now.time - now.step_at,
            step_ms=1000 * (now.step_at - before.step_at) / steps if before and steps else None,
            loss=self.loss,
            window=now.loader - before.loader if before else now.loader,
            gpu=self._read_gpu(),
            error=error,
        )

    def _window_start(self, first: _Mark, now: _Mark) -> _Mark:
        """The newest mark that is old enough and at least a step back."""
        marks = self._marks
        if not marks:
            marks.append(first)
        if len(marks) > 1 and marks[-1].step == now.step:
            # A step that takes hours must not pile them up.
            marks.pop()
        while len(marks) > 1 and now.time - marks[1].time > _WINDOW_S and marks[1].step < now.step:
            marks.popleft()
        marks.append(now)
        return marks[0]
