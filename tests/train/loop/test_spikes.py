"""A step whose gradients are far larger than those before is skipped, with a reason, by all ranks alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_runs import ALONE, OPTIM, SMALL, make_batch, run
from torch import Tensor

from cmae.model import build_model
from cmae.train.config import SpeedConfig
from cmae.train.loop import optim
from cmae.train.loop.optim import SpikeGuard
from cmae.train.loop.step import TrainStep

GOOD = torch.tensor(0.0)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "SPIKES_AFTER", 3)


def judged(norms: list[float], factor: float = 4.0) -> list[bool]:
    guard = SpikeGuard(factor, torch.device("cpu"))
    return [bool(guard.judge(torch.tensor(norm), is_bad=GOOD)) for norm in norms]


def test_the_mean_is_that_of_the_steps_that_were_taken() -> None:
    assert judged([1, 2, 3, 8.1, 8.1, 7.9]) == [False, False, False, True, True, False]
    # Not before enough steps were taken, and never for what is not finite anyway.
    assert judged([1, 100, 1, 1]) == [False] * 4
    assert judged([1, 1, 1, float("nan"), 3.9, 7]) == [False] * 5 + [True]


def test_steps_that_are_not_finite_do_not_move_the_mean() -> None:
    guard = SpikeGuard(4.0, torch.device("cpu"))
    guard.judge(torch.tensor(2.0), is_bad=GOOD)
    for norm in (float("inf"), float("nan"), 1e30):
        guard.judge(torch.tensor(norm), is_bad=torch.tensor(1.0))
    assert (guard.mean.item(), guard.count.item()) == (2.0, 1.0)


def grow(step: TrainStep, factor: float) -> None:
    """Have the next step's loss, and so its gradients, be `factor` times as large."""
    real = TrainStep.differentiate.__get__(step)

    def once(loss: Tensor) -> None:
        real(loss * factor)
        step.differentiate = real  # type: ignore[method-assign]

    step.differentiate = once  # type: ignore[method-assign]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_spike_moves_nothing_and_a_resumed_run_knows_the_mean(clip: float | None) -> None:
    settings = replace(OPTIM, spike_factor=10.0, clip_grad=clip)
    batch = make_batch(SMALL, 0, 8)

    def build() -> TrainStep:
        return TrainStep(build_model(SMALL, seed=0), settings, SpeedConfig(), ALONE)

    step, plain = (
        build(),
        TrainStep(
            build_model(SMALL, seed=0), replace(settings, spike_factor=None), SpeedConfig(), ALONE
        ),
    )
    for one in (step, plain):
        for _ in range(4):
            assert one([batch], lr=1e-3, momentum=0.9)[1]
    # To watch changes nothing.
    for name, value in plain.model.state_dict().items():
        assert torch.equal(step.model.state_dict()[name], value), name
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    scaler = step.scaler.state_dict()
    resumed = build()
    resumed.load_state_dict(step.state_dict())
    for one in (step, resumed):
        grow(one, 100.0)
        assert not one([batch], lr=1e-3, momentum=0.9)[1]
        assert "times the mean of the steps before (optim.spike_factor 10)" in one.why_skipped()
    for name, value in step.model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert step.scaler.state_dict()["scale"] == scaler["scale"]
    assert step([batch], lr=1e-3, momentum=0.9)[1]
    grow(step, float("nan"))
    assert not step([batch], lr=1e-3, momentum=0.9)[1]
    assert step.why_skipped() == "gradients are not finite"


def test_a_run_says_why_it_skipped(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = TrainStep.differentiate, []

    def differentiate(self: TrainStep, loss: Tensor) -> None:
        calls.append(loss)
        real(self, loss * (1000.0 if len(calls) == 6 else 1.0))

    monkeypatch.setattr(TrainStep, "differentiate", differentiate)
    outcome = run(small_shards, tmp_path / "run", **{"optim.spike_factor": 10})
    assert outcome.step == 8
    assert len(calls) == 9
    assert "step 6 skipped (1 in a row): gradients have a norm of" in capsys.readouterr().err
    (line,) = (tmp_path / "run" / "skipped_steps.rank0.jsonl").read_text().splitlines()
    assert "optim.spike_factor" in json.loads(line)["why"]
