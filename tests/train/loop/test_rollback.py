"""A run that goes astray begins again at its checkpoint behind the data, once; any step can be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import run

from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.train.commands.main import main
from cmae.train.loop.step import TrainStep
from cmae.train.loop.training import TrainingError

Call = Callable[..., tuple[torch.Tensor, bool]]


@pytest.fixture
def astray(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Steps in which gradients are not finite, by how many were asked for before; and all samples taken."""
    notes: dict[str, Any] = {"bad": set(), "calls": 0, "taken": []}
    real: Call = TrainStep.__call__

    def step(self: TrainStep, batches: Any, **options: Any) -> tuple[torch.Tensor, bool]:
        number = notes["calls"]
        notes["calls"] += 1
        samples = [one for batch in batches for one in batch.sample_id.tolist()]
        if number in notes["bad"]:
            return torch.full((5,), float("nan")), False
        notes["taken"].append(samples)
        return real(self, batches, **options)

    monkeypatch.setattr(TrainStep, "__call__", step)
    return notes


def test_it_begins_again_once_behind_the_data_that_led_it_astray(
    small_shards: str, tmp_path: Path, astray: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = {"optim.max_skipped_steps": 2, "run.checkpoint_every": 2}
    # Steps 1 2 3 are taken, two are skipped, and it goes on from the checkpoint of step 2.
    astray["bad"] = {3, 4}
    outcome = run(small_shards, out, **settings)
    assert outcome.step == 8
    printed = capsys.readouterr().err
    assert "GONE BACK to step 2: 2 steps in a row after step 3 were skipped" in printed
    assert "The 24 samples since that checkpoint are left out" in printed
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == list(range(1, 9))
    state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    (made,) = state["rollbacks"]
    assert (made["after_step"], made["skipped"], made["data"]["epoch"]) == (3, 2, 1)
    # The third step of the run is that of the batch behind those that were skipped.
    straight = tmp_path / "straight"
    astray.update(bad=set(), calls=0, before=astray["taken"], taken=[])
    run(small_shards, straight, **settings)
    assert astray["before"][:3] == astray["taken"][:3]
    assert astray["before"][3] == astray["taken"][5]


def test_a_run_that_goes_astray_again_stops_and_says_how_to_look(
    small_shards: str, tmp_path: Path, astray: dict[str, Any]
) -> None:
    astray["bad"] = {3, 4, 6, 7}
    settings = {"optim.max_skipped_steps": 2, "run.checkpoint_every": 2}
    with pytest.raises(TrainingError, match=r"again after 1 return.*cmae replay .* --step 4"):
        run(small_shards, tmp_path, **settings)
    # Killed and started again, it still knows: no way back is left.
    astray.update(bad={0, 1}, calls=0)
    with pytest.raises(TrainingError, match="again after 1 return"):
        run(small_shards, tmp_path, **settings)


def test_without_a_checkpoint_or_when_told_so_it_stops(
    small_shards: str, tmp_path: Path, astray: dict[str, Any]
) -> None:
    astray["bad"] = {0, 1}
    with pytest.raises(TrainingError, match="There is no checkpoint of it yet"):
        run(small_shards, tmp_path / "a", **{"optim.max_skipped_steps": 2})
    astray.update(bad={3, 4}, calls=0)
    settings = {"optim.max_skipped_steps": 2, "optim.max_rollbacks": 0}
    with pytest.raises(TrainingError, match="The last checkpoint"):
        run(small_shards, tmp_path / "b", **settings)


def test_a_step_that_was_skipped_is_repeated_and_its_first_bad_module_named(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = {"optim.lr_per_256": 1e30, "optim.warmup_epochs": 0, "optim.max_skipped_steps": 2}
    settings |= {"optim.max_rollbacks": 0, "run.checkpoint_every": 1}
    with pytest.raises(TrainingError) as caught:
        run(small_shards, out, **settings)
    step = int(str(caught.value).split("--step ")[1].split("`")[0])
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    capsys.readouterr()
    assert main(["replay", str(out), "--step", str(step)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"step {step} of {out} was skipped" in printed
    place = out / "replay" / f"step-{step:08d}"
    noted = json.loads((place / "replay.json").read_text())
    skipped = json.loads((out / "skipped_steps.rank0.jsonl").read_text().splitlines()[0])
    assert noted["samples"] == skipped["samples"]
    (found,) = noted["found"]  # float32 is the run's own precision
    assert found["forward"] or found["backward"]
    assert found["parameters"]
    assert (place / "batch.png").stat().st_size > 1000
    assert {path: path.read_bytes() for path in out.rglob("*.pt")} == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_was_taken_has_the_losses_of_the_run(
    small_shards: str, tmp_path: Path, precision: str
) -> None:
    out = tmp_path / "run"
    run(small_shards, out, **{"optim.precision": precision, "run.checkpoint_every": 3})
    for step in (1, 4, 6):
        assert main(["replay", str(out), "--step", str(step), "--out", str(tmp_path / "r")]) == 0
        noted = json.loads((tmp_path / "r" / "replay.json").read_text())
        record = json.loads((out / "metrics.jsonl").read_text().splitlines()[step - 1])
        assert [one["precision"] for one in noted["found"]] == list(
            dict.fromkeys([precision, "fp32"])
        )
        found = noted["found"][0]
        assert found["losses"]["total"] == pytest.approx(record["total"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-5)
        assert not found["forward"]
        assert not found["parameters"]


def test_what_cannot_be_replayed_is_said(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path), "--step", "3"]) == 1
    assert "holds no config.yaml" in capsys.readouterr().err
    run(small_shards, tmp_path / "run")
    assert main(["replay", str(tmp_path / "run"), "--step", "0"]) == 1
    assert main(["replay", str(tmp_path / "run"), "--step", "99"]) == 1
    assert "has only 8 steps" in capsys.readouterr().err
