"""Expected ranges: made of runs, read back, drawn, and told of where a run leaves them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import run

from cmae.errors import CmaeError
from cmae.train.commands.main import main
from cmae.train.config_parser import load_recipe, recipe_names
from cmae.train.monitor.bands import load_bands, make_bands, outside, write_bands
from cmae.train.monitor.plots import loss_plot

Capture = pytest.CaptureFixture[str]


def curve(offset: float, *, steps: int = 5) -> list[dict[str, float]]:
    return [{"step": 10 * i, "total": 2 / i + offset, "lr": 0.1} for i in range(1, steps + 1)]


def test_a_band_is_four_deviations_around_the_mean_of_shared_steps() -> None:
    offsets = [0.0, 0.1, 0.25]
    runs = [curve(offset, steps=4 + number) for number, offset in enumerate(offsets)]
    bands = make_bands(runs)
    assert set(bands) == {"total"}
    assert [step for step, _, _ in bands["total"]] == [10, 20, 30, 40]
    for step, low, high in bands["total"]:
        values = [20 / step + offset for offset in offsets]
        mean, half = statistics.fmean(values), 4 * statistics.stdev(values)
        assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-3)


def test_seeds_that_agree_leave_room_for_rounding() -> None:
    for _, low, high in make_bands([curve(0.0)] * 3)["total"]:
        assert high - low == pytest.approx(2 * 0.005 * (2 - 0.4), rel=0.02)


@pytest.mark.parametrize(
    ("runs", "message"),
    [([curve(0.0)] * 2, "not 2"), ([curve(0.0), curve(0.1), []], "no step in common")],
)
def test_what_makes_no_band_is_refused(runs: list[list[dict[str, float]]], message: str) -> None:
    with pytest.raises(CmaeError, match=message):
        make_bands(runs)


def test_what_leaves_its_band_is_named_with_both_ends() -> None:
    bands = {"total": [(10.0, 1.0, 3.0), (20.0, 0.5, 0.9), (60.0, 0.0, 0.1)]}
    assert outside(curve(0.0)[:1], bands) == []
    assert outside(curve(0.0), bands) == ["total is 1 at step 20, expected 0.5 to 0.9"]
    assert outside([{"step": 20, "total": float("nan")}], bands) != []
    assert outside([{"step": 15, "total": 9.0}], bands) == []


def test_bands_are_drawn_behind_the_curves(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [row | {"images_per_s": 1.0, "data_wait_pct": 0.0} for row in curve(0.0)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inks = []
    for bands in ({}, make_bands([curve(0.0), curve(0.1), curve(0.2)])):
        loss_plot(metrics, tmp_path / "loss.png", bands)
        inks.append(int((np.asarray(Image.open(tmp_path / "loss.png").convert("L")) < 250).sum()))
    assert inks[1] > inks[0] + 1000


def test_three_runs_make_bands_that_a_fourth_is_judged_by(
    small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    runs = [tmp_path / f"s{seed}" for seed in range(3)]
    for seed, out in enumerate(runs):
        run(small_shards, out, **{"optim.total_steps": 4, "run.log_every": 2, "seed": seed})
    bands = tmp_path / "bands.yaml"
    assert main(["compare", *map(str, runs), "--write_bands", str(bands)]) == 0
    made = load_bands(str(bands))
    assert {"total", "reconstruction", "contrastive_raw"} <= set(made)
    capsys.readouterr()
    settings = {"optim.total_steps": 4, "run.log_every": 2, "run.bands": str(bands)}
    run(small_shards, tmp_path / "same", **settings)
    assert "outside the expected" not in capsys.readouterr().err
    write_bands({"total": [(4.0, 100.0, 101.0)]}, bands)
    run(small_shards, tmp_path / "other", **settings)
    told = " ".join(capsys.readouterr().err.split())
    assert "outside the expected range" in told
    assert "at step 4, expected 100 to 101" in told


@pytest.mark.parametrize(
    "content", ["[1, 2]", "total: 3", "total: [[1, 2]]", "a: [", "total: [[x, 1, 2]]"]
)
def test_another_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bands.yaml"
    path.write_text(content)
    with pytest.raises(CmaeError, match=r"run\.bands=.*bands\.yaml is no file of bands"):
        load_bands(str(path))


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(CmaeError, match=r"run\.bands=dmeo.*demo.*did you mean"):
        load_bands("dmeo")


def test_shipped_bands_belong_to_recipes_and_contain_what_they_judge() -> None:
    assert recipe_names("bands") == ["demo"]
    assert load_recipe("demo").run.bands == "demo"
    bands = load_bands("demo")
    assert {"total", "knn_online", "linear_target", "rankme_online"} <= set(bands)
    every = load_recipe("demo").run.eval_every
    assert every is not None
    assert {step % every for step, _, _ in bands["knn_online"]} >= {0.0}
    assert bands["knn_online"][-1][1] > 0.5  # far above chance, which is 1 / 16
