"""Evaluation beside the training: numbers, cost, what a run shows; statistics against definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.tiny_runs import ALONE, MODEL, run

from cmae.errors import CmaeError
from cmae.model import load_model
from cmae.train.config_parser import load_recipe
from cmae.train.evaluation.online import OnlineEvaluation, ridge_accuracy
from cmae.train.evaluation.statistics import alignment, rank_me, spectrum_slope, uniformity
from cmae.train.monitor.metrics import read_metrics

METRICS = ("knn", "linear", "rankme", "spectrum_slope", "alignment", "uniformity")


def test_a_run_is_scored_on_the_way_and_learns_the_same(small_shards: str, tmp_path: Path) -> None:
    plain = run(small_shards, tmp_path / "plain", **{"optim.total_steps": 6})
    settings = {"run.eval_shards": small_shards, "run.eval_every": 3, "run.log_every": 4}
    scored = run(small_shards, tmp_path / "scored", **{"optim.total_steps": 6, **settings})
    records = read_metrics(tmp_path / "scored" / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 4, 6]
    for record in (records[0], records[2]):
        for metric in METRICS:
            for encoder in ("online", "target"):
                assert math.isfinite(record[f"{metric}_{encoder}"])
        assert 0 <= record["knn_online"] <= 1
        assert record["eval_s"] > 0
        assert 0 < record["eval_pct"] < 100
    assert "knn_online" not in records[1]
    assert (tmp_path / "scored" / "loss.png").stat().st_size > 1000
    weights = [load_model(one.checkpoint).state_dict() for one in (plain, scored) if one.checkpoint]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_the_same_model_has_the_same_scores(small_shards: str, tmp_path: Path) -> None:
    outcome = run(small_shards, tmp_path, **{"optim.total_steps": 1})
    assert outcome.checkpoint is not None
    overrides = {f"model.{key}": value for key, value in MODEL.items()}
    overrides |= {
        "run.eval_shards": small_shards,
        "run.eval_samples": 20,
        "optim.precision": "fp32",
    }
    overrides |= {"data.views.source_crop_size": 40, "data.views.target_shift": 8}
    evaluation = OnlineEvaluation(load_recipe(overrides=overrides), ALONE)
    model = load_model(outcome.checkpoint)
    first, again = evaluation(model), evaluation(model)
    for name in first.keys() - {"eval_s", "eval_pct"}:
        assert first[name] == again[name], name


def test_shards_that_are_not_there_are_named(small_shards: str, tmp_path: Path) -> None:
    with pytest.raises(CmaeError, match=r"none\.tar.*matches nothing"):
        run(small_shards, tmp_path, **{"run.eval_shards": str(tmp_path / "none.tar")})


def test_effective_rank_is_that_of_known_spectra() -> None:
    assert rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rank_me(torch.ones(20, 8)) == pytest.approx(1, abs=1e-3)
    torch.manual_seed(0)
    flat = torch.randn(100, 3) @ torch.randn(3, 32)
    assert 1 < rank_me(flat) < 3.01


def test_the_slope_of_a_power_law_is_found() -> None:
    torch.manual_seed(0)
    size = 200
    left, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -0.75  # of the matrix: half of 1.5
    made = left @ torch.diag(values) @ right
    assert spectrum_slope(made - made.mean(0)) == pytest.approx(1.5, rel=0.05)


def test_alignment_and_uniformity_are_their_formulas() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(30, 5), torch.randn(30, 5)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (first, second))
    expected = sum(float((x - y).pow(2).sum()) for x, y in zip(a, b, strict=True)) / 30
    assert alignment(first, second) == pytest.approx(expected, rel=1e-5)
    assert alignment(first, 3 * first) == pytest.approx(0, abs=1e-6)
    pairs = [float((a[i] - a[j]).pow(2).sum()) for i in range(30) for j in range(i)]
    expected = math.log(sum(math.exp(-2 * d) for d in pairs) / len(pairs))
    assert uniformity(first) == pytest.approx(expected, rel=1e-4)


def test_ridge_regression_finds_separable_classes() -> None:
    torch.manual_seed(0)
    centres = 4 * torch.randn(5, 12)
    labels = torch.arange(500) % 5
    x = centres[labels] + torch.randn(500, 12)
    found = ridge_accuracy(x[:400], labels[:400], x[400:], labels[400:], num_classes=5)
    assert found > 0.97
