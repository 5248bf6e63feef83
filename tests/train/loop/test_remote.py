"""Runs on remote shards: settings, secrets, and what the terminal shows while shards are copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from support.remote_servers import serve
from support.tiny_runs import arguments

from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.pipeline import FillProgress
from cmae.train.commands.main import main
from cmae.train.config import Config
from cmae.train.config_parser import parse_config
from cmae.train.monitor import metrics as metrics_module
from cmae.train.monitor.metrics import ColdStart, Display, read_metrics
from cmae.train.monitor.run_log import write_config

SECRET = "8f3e-very-secret"


def parse(*given: str) -> Config:
    return parse_config(given)


def totals(out: Path) -> list[float]:
    return [record["total"] for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(autouse=True)
def home_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_a_run_over_http_gives_the_losses_of_the_local_one_and_keeps_its_secrets(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    short = {"optim.total_steps": 4}
    assert main(["pretrain", *arguments(small_shards, local, **short)]) == 0
    with serve(Path(small_shards).parent) as server:
        server.latency_s = 0.02
        url = f"{server.url}/small-{{000000..000001}}.tar?sig={SECRET}"
        options = short | {
            "data.cache_dir": tmp_path / "cache",
            "data.storage_options": f"{{headers: {{X-Token: {SECRET}}}}}",
        }
        first = arguments(url, remote, **options, **{"run.stop_at_step": 2})
        assert main(["pretrain", *first]) == 0
        assert main(["pretrain", *arguments(url, remote, **options)]) == 0  # continues
    assert totals(remote) == totals(local)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    for file in [p for p in (*remote.rglob("*"), *(tmp_path / "cache").rglob("*")) if p.is_file()]:
        assert SECRET.encode() not in file.read_bytes(), file
    stored = load_checkpoint(list_checkpoints(remote / "checkpoints")[-1])["config"]["data"]
    assert stored["storage_options"] == {"headers": "***"}
    assert stored["shards"].endswith("?sig=***")


def test_a_store_that_cannot_be_reached_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as server:
        given = arguments(f"{server.url}/a.tar", tmp_path / "run")
        assert main(["pretrain", *given]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("cmae pretrain: error: ")
    assert f"{server.url}/a.tar: asking for size" in lines[-1]
    assert "Correct data.shards" in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_settings_reach_the_file_and_come_back_without_secrets(tmp_path: Path) -> None:
    config = parse(
        "--data.shards", "s3://bucket/train/",
        "--data.remote", "cache",
        "--data.cache_dir", "/scratch/cmae",
        "--data.cache_quota_gib", "200",
        "--data.remote_deadline_s", "120",
        "--data.storage_options", "{endpoint_url: 'http://127.0.0.1:1', anon: true}",
    )  # fmt: skip
    write_config(config, tmp_path / "config.yaml")
    assert parse("--recipe", str(tmp_path / "config.yaml")) == config
    assert config.data.storage_options == {"endpoint_url": "http://127.0.0.1:1", "anon": True}


def test_a_secret_is_hidden_in_every_form_and_must_be_given_again(tmp_path: Path) -> None:
    config = parse(
        "--data.storage_options", f"{{key: AKIA, secret: {SECRET}, endpoint_url: 'https://s3'}}"
    )
    assert SECRET not in repr(config)
    assert SECRET not in str(config.to_dict())
    write_config(config, tmp_path / "config.yaml")
    written = (tmp_path / "config.yaml").read_text()
    assert SECRET not in written
    assert yaml.safe_load(written)["data"]["storage_options"]["endpoint_url"] == "https://s3"
    with pytest.raises(ValueError, match=r"data\.storage_options is '\*\*\*'.*give it again"):
        parse("--recipe", str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("remote_deadline_s", "600", "below|< 600"),
        ("remote_deadline_s", "0", "must be > 0"),
        ("cache_quota_gib", "0", "must be > 0, or null"),
    ],
)
def test_what_is_out_of_range_is_named(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.(cache_dir|{key}).*({message})"):
        parse(f"--data.{key}", value)


def test_a_cache_without_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.cache_dir is None; .* when remote is 'cache'"):
        parse("--data.remote", "cache")


def report(done: int, *, what: str = "shards", total: int = 40) -> FillProgress:
    num_bytes = 0 if what == "indices" else 10**9
    return FillProgress(what, done, total, done * num_bytes, total * num_bytes, 2e8, 95.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module.time, "monotonic", clock.monotonic)
    return clock


def test_without_a_terminal_a_line_comes_every_few_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Display(10) as display:
        for done in range(40):
            clock.now += 1
            display.fill(report(done))
        display.fill(report(40))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 40 // 5 + 1
    assert lines[0] == "shards 4/40  4.0/40.0 GB  200 MB/s  ETA 0:01:35"
    assert lines[-1].startswith("shards 40/40")


def test_on_a_terminal_the_copying_has_a_bar_of_its_own_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: True))
    display = Display(10)
    assert display._bar is not None
    display.fill(report(3))
    display.fill(report(7))
    tasks = display._bar.tasks
    assert len(tasks) == 2
    assert (tasks[1].completed, tasks[1].total, tasks[1].visible) == (7, 40, True)
    assert "7.0/40.0 GB" in tasks[1].fields["text"]
    display.fill(report(40))
    assert not tasks[1].visible


def test_before_the_display_the_first_rank_prints_lines_and_the_others_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = ColdStart(prints=True), ColdStart(prints=False)
    clock.now += 6
    for cold_start in (first, other):
        cold_start(report(3, what="indices"))
    assert capsys.readouterr().err.splitlines() == ["indices 3/40  ETA 0:01:35"]
    shown: list[FillProgress] = []
    first.show = shown.append
    first(report(4))
    assert len(shown) == 1
    assert not capsys.readouterr().err


def test_the_default_deadline_is_below_the_collectives_timeout() -> None:
    from cmae.train.config import COLLECTIVE_TIMEOUT_S

    assert Config().data.remote_deadline_s <= COLLECTIVE_TIMEOUT_S / 2
    assert torch.distributed.is_available()
