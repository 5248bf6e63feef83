"""What a running job reports of itself, for `cmae top`: a small file a rank, rewritten every two seconds.

A background thread writes it, not the training loop: storage that hangs does not stop the run, and a step
that hangs does not stop the file, so that a reader can tell a stuck run from a dead one. The loop itself only
sets two numbers a step; docs/design/0016-reports.md says what that costs.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cmae.errors import CmaeError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.remote.schemes import redact
from cmae.pipeline.stage_stats import LoaderSnapshot
from cmae.printable import printable
from cmae.train.machine import process_space, process_start

if TYPE_CHECKING:
    # `cmae top` reads without torch.
    from cmae.train.distributed import World

EVERY_S = 2.0
_WINDOW_S = 10.0
"""Rates are means over this time, or over the last step where that took longer."""
_FORMAT = 2
_READ_FORMATS = (1, 2)
"""Format 1 has no `process_space` and no `process_start`."""

MAX_STATUS_BYTES = 1 << 20
"""Larger files are not read; a rank's has 2 kB."""

MAX_WORLD_SIZE = 1 << 20
"""Ranks of a run."""

STATES = ("running", "finished", "stopped", "failed")


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
    process_space: str = ""
    """Where `pid` is this process's number; see `process_space` of train/machine.py."""
    doing: str = ""
    """What the loop does: reading data, waiting for others, in the step."""
    process_start: int = 0
    """When the process with this number began, in clock ticks; 0 = unknown."""
    format: int = _FORMAT

    @property
    def wait_share(self) -> float:
        """Share of the window in which the loop waited for data, 0 to 1."""
        return self.window.wait_s / self.window.time_s if self.window.time_s > 0 else 0.0

    @property
    def images_per_s(self) -> float | None:
        """Over all ranks."""
        return 1000 * self.global_batch_size / self.step_ms if self.step_ms else None

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the old file or the new one."""
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        content = vars(self) | {"window": self.window.to_dict(), "loss": loss}
        text = json.dumps(content, allow_nan=False)
        with atomic_write(path) as file:
            file.write(text.encode())


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
    found: list[RunStatus] = []
    for path in sorted(status_folder(out).glob("rank-*.json")):
        # The first rank of a run that starts removes what more ranks have left.
        with suppress(FileNotFoundError):
            found.append(_load(path))
    if not found:
        raise CmaeError(
            f"{printable(str(out))} holds no live/rank-*.json; name the folder (run.out) of a run that has "
            "been started"
        )
    return found


def _load(path: Path) -> RunStatus:
    """Read what anybody may have written.

    Raises:
        CmaeError: It is no status, or one of another version.
    """
    try:
        if path.stat().st_size > MAX_STATUS_BYTES:
            raise ValueError(f"more than {MAX_STATUS_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") not in _READ_FORMATS:
            raise CmaeError(
                f"{path} has format {printable(repr(values.get('format')))}, this version reads "
                f"{' and '.join(map(str, _READ_FORMATS))}; use the version that runs the job"
            )
        return _parse(values)
    except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
        if isinstance(error, CmaeError):
            raise
        reason = f"{type(error).__name__}: {printable(str(error))}"
        raise CmaeError(
            f"{path} is no status of a run ({reason}); remove it: a run that goes on writes it anew"
        ) from error


def _parse(values: dict[str, Any]) -> RunStatus:
    """A status whose fields are all of their types, with text that can be printed.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: They are not.
    """
    names = [one.name for one in fields(RunStatus)]
    known = {name: values[name] for name in names if name in values}
    status = RunStatus(**{**known, "window": LoaderSnapshot.from_dict(values["window"])})
    for one in (status, status.window, *status.window.stages.values()):
        _check_types(one)
    counts = [stage.histogram.counts for stage in status.window.stages.values()]
    for number in (*status.gpu.values(), *(count for one in counts for count in one)):
        _check_number(number)
    if status.state not in STATES:
        raise ValueError(f"state {status.state!r}")
    if not 0 <= status.rank < status.world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"rank {status.rank} of {status.world_size}")
    if not 0 < status.pid < 1 << 31:
        raise ValueError(f"process {status.pid}")
    return replace(
        status,
        host=printable(status.host),
        device=printable(status.device),
        error=printable(status.error, limit=_MAX_ERROR),
        doing=printable(status.doing),
    )


_MAX_ERROR = 2000
_TYPES = {"int": int, "float": int | float, "str": str, "float | None": int | float | None}


def _check_types(one: Any) -> None:
    """Compare the plain fields of a dataclass with what they are declared as.

    Raises:
        TypeError: One is of another type.
        ValueError: A number is not finite, or out of all reason.
    """
    for known in fields(one):
        value, wanted = getattr(one, known.name), _TYPES.get(str(known.type))
        if wanted is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise TypeError(f"{known.name} is {value!r}")
        if isinstance(value, int | float):
            _check_number(value)


def _check_number(value: Any) -> None:
    if not isinstance(value, int | float) or not abs(value) < 1e18:
        raise ValueError(f"{value!r} is no number of a run")


def _host_name() -> str:
    try:
        return socket.gethostname()
    except OSError:
        return "?"


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
        doing: Function that says what the loop does.
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
        doing: Callable[[], str] = str,
        every_s: float = EVERY_S,
    ) -> None:
        self.loss: float | None = None
        """Set by the loop when it has read one from the device."""
        self.error: Exception | None = None
        """Why the last writing failed; it is tried again for as long as the run goes on."""
        self._path = status_folder(out) / f"rank-{world.rank:04d}.json"
        self._world, self._total_steps = world, total_steps
        self._host, self._process_space = _host_name(), process_space()
        self._process_start = process_start(os.getpid()) or 0
        self._global_batch_size = global_batch_size
        self._snapshot, self._read_gpu, self._every_s = snapshot, read_gpu, every_s
        self._doing = doing
        # One assignment: the other thread sees both or none.
        self._last = (step, time.perf_counter())
        self._first: _Mark | None = None
        self._marks: deque[_Mark] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cmae-status", daemon=True)

    def __enter__(self) -> Self:
        """Remove what an earlier run with more ranks left, and start writing."""
        if self._world.is_main:
            with suppress(OSError):
                for path in self._path.parent.glob("rank-*.json"):
                    number = path.stem.removeprefix("rank-")
                    if number.isdecimal() and int(number) >= self._world.world_size:
                        path.unlink()
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
        # Whatever it is, such as a driver's library that fails: the next writing may work.
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._status(state, error).save(self._path)
        except Exception as failure:
            self.error = failure
        else:
            self.error = None

    def _status(self, state: str, error: str) -> RunStatus:
        # Looked at first: a mark from before the first step must not come after it.
        first = self._first
        now = _Mark(time.perf_counter(), *self._last, self._snapshot())
        before = self._window_start(first, now) if first else None
        steps = now.step - before.step if before else 0
        return RunStatus(
            rank=self._world.rank,
            world_size=self._world.world_size,
            host=self._host,
            pid=os.getpid(),
            process_space=self._process_space,
            process_start=self._process_start,
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
            doing=self._doing(),
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
