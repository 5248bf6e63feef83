"""Services that metrics go to, by their own clients: each step once, also over a resume."""

from __future__ import annotations

import json
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_runs import run

from cmae.errors import CmaeError
from cmae.train.config import RunConfig
from cmae.train.loop import training
from cmae.train.monitor.services import choose
from cmae.train.monitor.services.choose import choose_services


def totals(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["total"]) for line in lines]


def test_mlflow_has_every_step_once_after_a_kill_and_a_resume(
    small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    out, uri = tmp_path / "run", f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = {"run.mlflow_uri": uri, "run.checkpoint_every": 3}
    real = training.Training._note

    def killed(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        run(small_shards, out, **settings)
    monkeypatch.setattr(training.Training, "_note", real)
    run(small_shards, out, **settings)
    client = mlflow.MlflowClient(uri)
    number = (out / "mlflow_run_id").read_text()
    history = sorted((one.step, one.value) for one in client.get_metric_history(number, "total"))
    assert [step for step, _ in history] == list(range(1, 9))
    assert history == [(step, pytest.approx(value)) for step, value in totals(out)]
    params = client.get_run(number).data.params
    assert params["optim.total_steps"] == "8"


def test_prometheus_reads_the_newest_metrics(
    small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, seen = f"http://127.0.0.1:{port}/metrics", {}
    real = training.Training._note

    def note(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        seen[self.step] = urllib.request.urlopen(url, timeout=10).read().decode()

    monkeypatch.setattr(training.Training, "_note", note)
    run(small_shards, tmp_path / "run", **{"run.prometheus_port": port, "run.stop_at_step": 3})
    for step, total in totals(tmp_path / "run"):
        lines = dict(line.rsplit(" ", 1) for line in seen[step].splitlines() if line[0] != "#")
        assert float(lines['cmae_step{run="run"}']) == step
        assert float(lines['cmae_total{run="run"}']) == pytest.approx(total)
        assert 'cmae_images_per_s{run="run"}' in lines
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=2)


def test_a_port_that_is_taken_is_a_warning(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"run.prometheus_port": port, "run.stop_at_step": 2}
        assert run(small_shards, tmp_path, **settings).step == 2
    assert "Prometheus" in capsys.readouterr().err


def test_weights_and_biases_gets_one_run_also_after_a_resume(
    small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, steps = [], []
    service = SimpleNamespace(
        log=lambda record, step: steps.append(step), finish=lambda: steps.append("end")
    )

    def init(**options: Any) -> Any:
        started.append(options)
        return service

    fake = SimpleNamespace(util=SimpleNamespace(generate_id=lambda: f"id{len(started)}"), init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delitem(sys.modules, "cmae.train.monitor.services.wandb_service", raising=False)
    monkeypatch.setattr(choose, "find_spec", lambda name: True)
    for last in (2, 4):
        run(small_shards, tmp_path, **{"run.wandb_project": "p", "run.stop_at_step": last})
    monkeypatch.delitem(sys.modules, "cmae.train.monitor.services.wandb_service")
    assert [one["id"] for one in started] == ["id0", "id0"]
    assert steps == [1, 2, "end", 3, 4, "end"]
    assert started[0]["config"]["optim"]["total_steps"] == 8


@pytest.mark.parametrize(
    ("setting", "repair"),
    [
        ({"wandb_project": "p"}, r"pip install 'cmae\[wandb\]'"),
        ({"mlflow_uri": "http://h"}, r"pip install 'cmae\[mlflow\]'"),
        ({"prometheus_port": 9000}, r"pip install 'cmae\[prometheus\]'"),
    ],
)
def test_a_missing_package_is_named_before_the_run_begins(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], repair: str
) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(CmaeError, match=repair):
        choose_services(RunConfig(**setting), {})
