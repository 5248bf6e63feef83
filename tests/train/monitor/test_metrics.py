"""Records of a run: each step once, readable after a kill."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmae.model import Losses
from cmae.train.distributed import World
from cmae.train.monitor import metrics as metrics_module
from cmae.train.monitor.metrics import MetricLog, MetricWindow, describe, read_metrics

ALONE = World(0, 1, torch.device("cpu"))


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"total": float(step)})
    log.close()
    log = MetricLog(tmp_path, start_step=3)
    log.write(4, {"total": 40.0})
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["total"]) for record in records] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "total": 1.0}\n{"step": 2, "to')
    assert read_metrics(path) == [{"step": 1, "total": 1.0}]


def test_a_damaged_line_in_the_middle_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "total": 1.5}}\n'.encode() for step in range(1, 101)]
    damage = {18: bytes(512) + b"\n", 40: b"[1]\n", 41: b'"x"\n', 60: b"[" * 9000 + b"\n"}
    damage |= {70: b'{"total": 2.0}\n', 71: b'{"step": "7", "total": 2.0}\n', 72: b"\xff\xfe\n"}
    for number, damaged in damage.items():
        lines[number] = damaged
    path.write_bytes(b"".join(lines))
    log = MetricLog(tmp_path, start_step=100)
    log.close()
    assert log.num_damaged == len(damage)
    kept = [record["step"] for record in read_metrics(path)]
    assert kept == [step for step in range(1, 101) if step - 1 not in damage]


def test_what_is_not_a_number_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write(1, {"total": math.nan, "lr": math.inf})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert path.read_text() == '{"step": 1, "total": null, "lr": null}\n'
    assert math.isnan(read_metrics(path)[0]["total"])


def test_records_wait_for_a_full_disk_and_are_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    warnings: list[str] = []
    log = MetricLog(tmp_path, warn=warnings.append)
    with monkeypatch.context() as full:
        full.setattr(metrics_module, "_append_whole", refuse)
        log.write(1, {"total": 1.0})
        log.write(2, {"total": 2.0})
    log.write(3, {"total": 3.0})
    log.close()
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 3]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


def test_a_write_that_fails_leaves_no_half_of_a_line(tmp_path: Path) -> None:
    import resource

    log = MetricLog(tmp_path, warn=lambda message: None)
    log.write(1, {"total": 1.0})
    size = log.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        log.write(2, {"total": 2.0})
        assert log.path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(3, {"total": 3.0})
    log.close()
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 3]


@pytest.mark.parametrize("fails_at", ["opening", "writing", "closing"])
def test_a_tensorboard_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    import torch.utils.tensorboard.writer as writer_module

    class Board:
        def __init__(self, *_: Any, **__: Any) -> None:
            self._refuse("opening")

        def _refuse(self, what: str) -> None:
            if what == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def add_scalar(self, *_: Any) -> None:
            self._refuse("writing")

        def close(self) -> None:
            self._refuse("closing")

    monkeypatch.setattr(writer_module, "SummaryWriter", Board)
    warnings: list[str] = []
    log = MetricLog(tmp_path, warn=warnings.append)
    log.write(1, {"total": 1.0})
    log.write(2, {"total": 2.0})
    log.close()
    assert len(warnings) == 1
    assert "TensorBoard: output failed" in warnings[0]
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]


def test_a_tensorboard_that_failed_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.tensorboard.writer as writer_module

    written: list[int] = []
    is_full = [True]

    class Board:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.is_broken = False

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.is_broken |= is_full[0]
            if self.is_broken:  # as its thread, which ends with the first failure
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(step)

        def close(self) -> None:
            pass

    monkeypatch.setattr(writer_module, "SummaryWriter", Board)
    warnings: list[str] = []
    log = MetricLog(tmp_path, warn=warnings.append)
    log.write(1, {"total": 1.0})
    log.write(2, {"total": 2.0})
    is_full[0] = False
    log.write(3, {"total": 3.0})
    log.close()
    assert (written, len(warnings)) == ([3], 1)


@pytest.mark.parametrize("fails_at", ["init", "log"])
def test_a_service_that_does_not_answer_is_left_out_with_one_warning(
    tmp_path: Path, fails_at: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no answer")

    def accept(*_: Any, **__: Any) -> None:
        pass

    actions = {"log": accept, "close": accept}
    service = SimpleNamespace(**actions | {fails_at: refuse})
    opens = refuse if fails_at == "init" else lambda: service
    warnings: list[str] = []
    log = MetricLog(tmp_path, services={"Weights & Biases": opens}, warn=warnings.append)
    log.write(1, {"total": 1.0})
    log.close()
    assert len(warnings) == 1
    assert "no more output to Weights & Biases (RuntimeError: no answer)" in warnings[0]
    assert [record["step"] for record in read_metrics(log.path)] == [1]


def test_a_metric_of_an_older_run_is_read_under_its_present_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "info_nce": 6.5}\n')
    assert read_metrics(path) == [{"step": 1, "contrastive_raw": 6.5}]


def test_a_window_holds_the_mean_since_the_last_record() -> None:
    window = MetricWindow(ALONE.device)
    window.add(torch.full((len(Losses._fields),), 9.0))
    window.read(images_per_step=8, waited_s=0.0, world=ALONE)
    for value in (1.0, 3.0):
        window.add(torch.full((len(Losses._fields),), value))
    record = window.read(images_per_step=8, waited_s=0.0, world=ALONE)
    assert record["total"] == 2.0
    assert record["images_per_s"] > 0


def test_a_line_leaves_out_terms_that_the_model_does_not_have() -> None:
    record = dict.fromkeys(Losses._fields, 0.0)
    record |= {"total": 1.5, "reconstruction": 1.5, "images_per_s": 10.0, "data_wait_pct": 0.0}
    line = describe(record)
    assert "pixel 1.5000" in line
    assert "contrast" not in line
