"""What a run reports while it goes: JSON lines, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor

from cmae.model import Losses
from cmae.pipeline import FillProgress
from cmae.pipeline.formats.atomic import atomic_write
from cmae.printable import MAX_LINE, printable
from cmae.train.distributed import World, mean_over_ranks
from cmae.train.monitor.console import PlainConsole
from cmae.train.monitor.services.choose import Service
from cmae.train.monitor.sinks import LastingStream, Sink
from cmae.train.monitor.status import format_duration


class MetricWindow:
    """Means of the losses since the last record, kept on the device until somebody looks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(Losses._fields), device=device, dtype=torch.float32)
        self._steps = 0
        self._started = time.perf_counter()
        self._waited = 0.0

    def add(self, losses: Tensor) -> None:
        """Add one step's stacked losses, in the order of `Losses`."""
        self._sums += losses
        self._steps += 1

    def read(self, *, images_per_step: int, waited_s: float, world: World) -> dict[str, float]:
        """Means over the window and all ranks; starts the next window. Synchronises with the device.

        Args:
            images_per_step: Images of a step over all ranks.
            waited_s: Seconds that the loop has waited for data since its start.
            world: This process among all; a collective, every rank must call.
        """
        means = mean_over_ranks(self._sums / max(1, self._steps), world).tolist()
        now = time.perf_counter()
        elapsed = now - self._started
        record = dict(zip(Losses._fields, means, strict=True))
        record["images_per_s"] = self._steps * images_per_step / elapsed
        record["data_wait_pct"] = 100 * (waited_s - self._waited) / elapsed
        self._sums.zero_()
        self._steps, self._started, self._waited = 0, now, waited_s
        return record


class MetricLog:
    """The records of one run: `metrics.jsonl`, TensorBoard events, and services where asked for.

    Records after `start_step`, left by a run that was killed, are removed: each step stands there once.
    """

    def __init__(
        self,
        out: Path,
        *,
        start_step: int = 0,
        services: Mapping[str, Callable[[], Service]] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.path = out / "metrics.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.num_damaged = 0
        """Damaged lines that the file held."""
        self._warn = warn
        try:
            self.num_damaged = _drop_records_after(self.path, start_step)
        except OSError as error:
            warn(f"{self.path} may hold records of later steps, which cannot be removed ({error})")
        self._pending: list[str] = []
        self._board = Sink("TensorBoard", warn, reopen=lambda: self._open_board(out, None))
        self._writer: Any = None
        self._board.run(lambda: self._open_board(out, start_step + 1))
        self._services: list[tuple[Sink, Service]] = []
        for name, open_service in (services or {}).items():
            self._open_service(name, open_service)

    def _open_board(self, out: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge_step)

    def _open_service(self, name: str, open_service: Callable[[], Service]) -> None:
        sink = Sink(name, self._warn)
        sink.run(lambda: self._services.append((sink, open_service())))

    def write(self, step: int, record: dict[str, float]) -> None:
        """Append one record to every sink; what the disk refuses now is tried again with the next record."""
        self._append(_to_line({"step": step, **record}))
        self._board.run(lambda: self._write_scalars(step, record))
        for sink, service in self._services:
            sink.run(partial(service.log, step, record))

    def _append(self, line: str) -> None:
        was_refused = bool(self._pending)
        self._pending = [*self._pending, line][-_MAX_PENDING:]
        try:
            _append_whole(self.path, "".join(self._pending).encode())
        except OSError as error:
            if not was_refused:
                self._warn(
                    f"{self.path} cannot be written ({error}); its lines are kept and tried again"
                )
        else:
            self._pending = []

    def _write_scalars(self, step: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close every sink."""
        if self._writer is not None:
            self._board.run(self._writer.close)
        for sink, service in self._services:
            sink.run(service.close)


_MAX_PENDING = 100_000
"""Records that wait for a full disk; the oldest of more are lost."""

_RENAMED = {"info_nce": "contrastive_raw"}
"""Names of metrics in files of older runs, and their present names."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a metrics file, oldest first; lines that a kill or a power cut has damaged are left out.

    Metrics that older runs wrote under another name have their present one; null is not a number.
    """
    return _read_records(path)[0]


def _read_records(path: Path) -> tuple[list[dict[str, float]], int]:
    """The records of a metrics file, and its number of damaged lines."""
    if not path.is_file():
        return [], 0
    records: list[dict[str, float]] = []
    num_damaged = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        record = _parse_record(line)
        if record is None:
            num_damaged += 1
        else:
            records.append(record)
    return records, num_damaged


def _parse_record(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {
        _RENAMED.get(str(name), str(name)): math.nan if value is None else value
        for name, value in record.items()
        if value is None or isinstance(value, int | float)
    }


def _drop_records_after(path: Path, step: int) -> int:
    """Remove later records and damaged lines; returns the number of the damaged ones."""
    if not path.is_file():
        return 0
    records, num_damaged = _read_records(path)
    kept = [record for record in records if record["step"] <= step]
    # A kill in the middle must not cost the history.
    with atomic_write(path) as file:
        file.write("".join(_to_line(record) for record in kept).encode())
    return num_damaged


def _to_line(record: dict[str, float]) -> str:
    """One record as JSON, where what is not finite is null."""
    plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _append_whole(path: Path, data: bytes) -> None:
    """Append all of it or nothing: a full disk must not leave half a line."""
    # Unbuffered, or closing would write what was refused once more.
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        written = 0
        try:
            while written < len(data):
                written += file.write(data[written:]) or 0
        except OSError:
            with suppress(OSError):
                os.truncate(path, end)
            raise


class Display:
    """The terminal: a live bar where there is one, else a line for every record.

    Args:
        total_steps: Length of the bar.
        start_step: Step that a resumed run begins after.
        live: Whether to draw the bar when the output is a terminal.
        fallback: File for what is printed after the terminal or pipe is gone.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        live: bool = True,
        fallback: Path | None = None,
    ) -> None:
        err: Any = sys.stderr
        stream: Any = err if isinstance(err, LastingStream) else LastingStream(err)
        stream.fallback = fallback
        self.console = PlainConsole(file=stream)
        self._total = total_steps
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._fill_task: TaskID | None = None
        self._fill_lines = _FillLines()
        self._started = (time.perf_counter(), start_step)
        if live and self.console.is_terminal:
            self._bar = _build_bar(self.console)
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step, text="", eta="-"
            )

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to this step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, eta=self._eta(step))

    def show(self, step: int, record: dict[str, float]) -> None:
        """Show a record: in the bar, or as a line."""
        text = describe(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text, eta=self._eta(step))
        else:
            eta = self._eta(step)
            self.console.print(f"step {step}/{self._total}  {text}  ETA {eta}", soft_wrap=True)

    def fill(self, progress: FillProgress) -> None:
        """Show how far the copying of remote shards is: in a bar of its own, or as a line now and then."""
        if self._bar is None:
            if self._fill_lines.is_due(progress):
                self.log(describe_fill(progress))
            return
        if self._fill_task is None:
            self._fill_task = self._bar.add_task("", total=progress.num_total, text="", eta="-")
        done = progress.num_done == progress.num_total
        self._bar.update(
            self._fill_task,
            completed=progress.num_done,
            text=describe_fill(progress),
            eta="-",
            visible=not done,
        )

    def log(self, message: str | Text) -> None:
        """Print a message above the bar, on one line."""
        text = Text(printable(message, limit=MAX_LINE)) if isinstance(message, str) else message
        self.console.print(text, soft_wrap=True)

    def _eta(self, step: int) -> str:
        started, first = self._started
        if step <= first:
            return "-"
        seconds = (time.perf_counter() - started) / (step - first) * (self._total - step)
        return format_duration(seconds)


class _FillLines:
    """Picks the reports that are worth a line: one every few seconds, and the last."""

    _EVERY_S = 5.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self, progress: FillProgress) -> bool:
        if time.monotonic() < self._last + self._EVERY_S and progress.num_done < progress.num_total:
            return False
        self._last = time.monotonic()
        return True


class ColdStart:
    """Takes the loader's reports on remote shards, which begin before there is a display.

    Args:
        prints: Whether to print lines until `show` is set; the first rank's task.
    """

    def __init__(self, *, prints: bool) -> None:
        self.show: Callable[[FillProgress], None] | None = None
        """Where reports go as soon as the display is there."""
        self._prints = prints
        self._lines = _FillLines()

    def __call__(self, progress: FillProgress) -> None:
        """Show a report."""
        if self.show is not None:
            self.show(progress)
        elif self._prints and self._lines.is_due(progress):
            PlainConsole(stderr=True).print(describe_fill(progress), soft_wrap=True)


def describe_fill(progress: FillProgress) -> str:
    """`shards 12/640  1.3/71.2 GB  212 MB/s  ETA 0:05:30`."""
    parts = [f"{progress.what} {progress.num_done}/{progress.num_total}"]
    if progress.bytes_total:
        parts += [
            f"{progress.bytes_done / 1e9:.1f}/{progress.bytes_total / 1e9:.1f} GB",
            f"{progress.bytes_per_s / 1e6:.0f} MB/s",
        ]
    if progress.eta_s is not None:
        parts.append(f"ETA {format_duration(progress.eta_s)}")
    return "  ".join(parts)


def describe(record: dict[str, float]) -> str:
    """One line for one record; terms that the model does not have are left out."""
    parts = []
    if "images_per_s" in record:
        parts = [f"{record['images_per_s']:.4g} images/s", f"wait {record['data_wait_pct']:.1f}%"]
    if "mfu_pct" in record:
        parts.append(f"MFU {record['mfu_pct']:.0f}%")
    parts += [f"loss {record['total']:.4f}"]
    if "knn_online" in record:
        parts.append(
            f"k-NN {record['knn_online']:.1%} linear {record['linear_online']:.1%} (evaluation takes "
            f"{record['eval_pct']:.2g}% of the time)"
        )
    names = {
        "reconstruction": "pixel",
        "contrastive": "contrast",
        "positive_similarity": "pos",
        "negative_similarity": "neg",
        "feature_std": "std",
    }
    parts += [
        f"{short} {record[name]:.4f}"
        for name, short in names.items()
        if _is_live(record.get(name, 0.0))
    ]
    return "  ".join(parts)


def _is_live(value: float) -> bool:
    return value != 0.0 or not math.isfinite(value)


def _build_bar(console: PlainConsole) -> Progress:
    return Progress(
        TextColumn("{task.completed:.0f}/{task.total:.0f}", style="bold", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        refresh_per_second=4,
    )
