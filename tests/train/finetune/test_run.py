"""`cmae finetune`: it learns, goes on exactly, refuses other settings; partial runs and classification."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import SMALL

from cmae.errors import CmaeError
from cmae.model import build_model
from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.train.commands.main import main
from cmae.train.finetune.config import FinetuneConfig
from cmae.train.finetune.run import finetune
from cmae.train.loop.weights import save_model
from cmae.train.monitor.metrics import read_metrics

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_model(build_model(SMALL, seed=0), path)
    return str(path)


def settings(encoder: str, shards: str, out: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "epochs": 4,
        "global_batch_size": 8,
        "lr_per_256": 0.05,
        "warmup_epochs": 1,
        "layer_decay": 0.9,
        "log_every": 1,
        "progress": False,
        "device": "cpu",
        "num_threads": 1,
        "ema": 0.5,
        **changes,
    }
    return FinetuneConfig(encoder=encoder, train=shards, val=shards, out=out, **values)


def words_of(config: FinetuneConfig) -> list[str]:
    return [
        word
        for name, value in vars(config).items()
        if value is not None
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def test_it_learns_what_the_gratings_are(encoder: str, small_shards: str, tmp_path: Path) -> None:
    plain = {
        "mixup": 0.0,
        "cutmix": 0.0,
        "randaugment_ops": 0,
        "random_erasing": 0.0,
        "drop_path": 0.0,
    }
    config = settings(encoder, small_shards, tmp_path, epochs=25, ema=None, min_area=0.6, **plain)
    outcome = finetune(replace(config, label_smoothing=0.0, eval_every=25))
    assert outcome.exit_code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["val_top1"] > 0.6  # chance is .25
    assert result["num_images"] == 40
    losses = [
        record["total"] for record in read_metrics(tmp_path / "metrics.jsonl") if "total" in record
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_a_hybrid_encoder_learns_too(small_shards: str, tmp_path: Path) -> None:
    """With stochastic depth in its stages, at another image size than it was pretrained at."""
    hybrid = replace(SMALL, encoder="hybrid", patch_size=16, mask_ratio=0.5, mask_unit=1)
    save_model(build_model(hybrid, seed=0), tmp_path / "model.pt")
    config = settings(str(tmp_path / "model.pt"), small_shards, tmp_path / "out", img_size=48)
    outcome = finetune(replace(config, mixup=0.0, cutmix=0.0, epochs=8))
    assert outcome.exit_code == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    losses = [record["total"] for record in records if "total" in record]
    assert losses[-1] < losses[0]


def test_an_interrupted_run_ends_as_an_undisturbed_one(
    encoder: str, small_shards: str, tmp_path: Path
) -> None:
    """With all augmentation, stochastic depth and a moving average."""
    whole = settings(encoder, small_shards, tmp_path / "whole", micro_batch_size=4)
    finetune(whole)
    parts = replace(whole, out=tmp_path / "parts", checkpoint_every=100)
    command = [sys.executable, "-m", "cmae.train", "finetune", *words_of(parts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    interrupted = 0
    for _ in range(20):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        _wait_for_a_step(process, parts.out)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        interrupted += process.returncode == 75
        if process.returncode == 0:
            break
    assert interrupted >= 1
    found, expected = (
        load_checkpoint(list_checkpoints(one.out / "checkpoints")[-1])["trainer"]
        for one in (parts, whole)
    )
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name
    records = [
        [(r["step"], r["total"]) for r in read_metrics(one.out / "metrics.jsonl") if "total" in r]
        for one in (parts, whole)
    ]
    assert records[0] == records[1]


def _wait_for_a_step(process: subprocess.Popen[str], out: Path) -> None:
    """Until the run has taken a step more than its metrics held at the start, or has ended."""
    path = out / "metrics.jsonl"
    before = len(read_metrics(path)) if path.exists() else 0
    for _ in range(600):
        if process.poll() is not None or (path.exists() and len(read_metrics(path)) >= before + 3):
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_two_ranks_train_together(encoder: str, small_shards: str, tmp_path: Path) -> None:
    config = settings(encoder, small_shards, tmp_path, epochs=2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "cmae.train", "finetune", *words_of(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["num_images"] == 40


def test_other_settings_do_not_continue_a_run(
    encoder: str, small_shards: str, tmp_path: Path
) -> None:
    config = settings(encoder, small_shards, tmp_path, epochs=1)
    finetune(config)
    with pytest.raises(CmaeError, match=r"other settings: layer_decay was 0\.9 and is 0\.5"):
        finetune(replace(config, layer_decay=0.5))
    assert finetune(replace(config, num_threads=2)).exit_code == 0


def test_partial_runs_stand_side_by_side(
    encoder: str, small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    config = settings(encoder, small_shards, tmp_path, epochs=1)
    assert main(["evaluate", "partial", *words_of(config), "--counts", "0", "0.5", "1"]) == 0
    rows = json.loads((tmp_path / "partial.json").read_text())["rows"]
    assert [row["blocks"] for row in rows] == ["0", "0.5", "1"]
    assert "blocks trained" in capsys.readouterr().out


def test_a_classifier_is_scored_by_class_with_a_picture(
    encoder: str, small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    finetune(settings(encoder, small_shards, tmp_path, epochs=1))
    assert main(["evaluate", "classify", str(tmp_path), small_shards]) == 0
    scores = json.loads((tmp_path / "classify" / "scores.json").read_text())
    assert scores["num_images"] == 40
    assert sum(map(sum, scores["confusion"])) == 40
    diagonal = sum(scores["confusion"][n][n] for n in range(4))
    assert scores["top1"] == pytest.approx(diagonal / 40)
    assert scores["top1"] == pytest.approx(
        json.loads((tmp_path / "result.json").read_text())["val_top1"]
    )
    assert (tmp_path / "classify" / "confusion.png").stat().st_size > 1000
    assert "top-1" in capsys.readouterr().out


def test_the_linear_recipe_trains_the_head_alone(
    encoder: str, small_shards: str, tmp_path: Path
) -> None:
    config = settings(encoder, small_shards, tmp_path, epochs=1, ema=None)
    words = [*words_of(config)]
    for name in ("lr_per_256", "layer_decay", "warmup_epochs"):
        at = words.index(f"--{name}")
        del words[at : at + 2]
    given = (
        "blocks",
        "head",
        "pool",
        "optimizer",
        "mixup",
        "cutmix",
        "randaugment_ops",
        "min_area",
    )
    given += ("random_erasing", "label_smoothing", "drop_path", "min_lr", "weight_decay")
    for name in given:
        if f"--{name}" in words:
            at = words.index(f"--{name}")
            del words[at : at + 2]
    assert main(["finetune", "--recipe", "linear", *words]) == 0
    state = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert state["finetune"]["optimizer"] == "lars"
    trained = state["trainer"]["optimizer"]["state"]
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks", 0.7, "blocks is 0.7"),
        ("layer_decay", 0.0, "layer_decay is 0.0"),
        ("epochs", 0, "epochs is 0"),
        ("ema", 1.0, "ema is 1.0"),
        ("encoder", "", "encoder is ''"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CmaeError, match=message):
        settings("x", "x", tmp_path, **{name: value}) if name != "encoder" else settings(
            value, "x", tmp_path
        )
