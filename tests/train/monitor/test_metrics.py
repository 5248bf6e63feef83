"""Records of a run: each step once, readable after a kill."""

from __future__ import annotations

from pathlib import Path

import torch

from cmae.model import Losses
from cmae.train.distributed import World
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
