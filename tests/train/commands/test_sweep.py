"""`cmae sweep`: it runs, resumes, scores, and its table's numbers are those of the runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from support.tiny_runs import arguments

from cmae.errors import CmaeError
from cmae.train.commands.main import main
from cmae.train.commands.sweep import METRICS, _config, read_sweep, summarise
from cmae.train.config_parser import recipe_names

Capture = pytest.CaptureFixture[str]


def write_file(path: Path, shards: str, **changes: object) -> Path:
    words = arguments(shards, path.parent / "unused", **{"optim.total_steps": 2})
    keys = [word[2:] for word in words[::2]]
    settings = {key: yaml.safe_load(value) for key, value in zip(keys, words[1::2], strict=True)}
    del settings["run.out"]
    content = {
        "base": [],
        "settings": settings,
        "train": shards,
        "val": shards,
        "variants": {"full": {}, "no contrast": {"model.contrastive_loss": "none"}},
        **changes,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_variants_and_seeds_run_once_and_stand_in_one_table(
    small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    file = write_file(tmp_path / "sweep.yaml", small_shards)
    out = tmp_path / "out"
    assert main(["sweep", str(file), "--seeds", "2", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())
    assert [(row["name"], row["metric"]) for row in rows] == [
        (name, metric) for metric in METRICS for name in ("full", "no contrast")
    ]
    for row in rows:
        folder = out / row["name"].replace(" ", "-")
        kept = [json.loads((folder / f"seed-{n}" / "scores.json").read_text()) for n in range(2)]
        assert row["values"] == [one[row["metric"]] for one in kept]
        assert row["mean"] == pytest.approx(sum(row["values"]) / 2)
    table = capsys.readouterr().out
    assert "| full |" in table
    assert "| no contrast |" in table
    assert (out / "sweep.png").stat().st_size > 1000
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("step-*.pt")}
    assert len(stamps) == 4
    assert main(["sweep", str(file), "--seeds", "2", "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("step-*.pt")} == stamps


def test_differences_are_by_seed_with_their_error() -> None:
    first = [{"knn": 0.10, "linear": 0.2}, {"knn": 0.30, "linear": 0.4}]
    other = [{"knn": 0.12, "linear": 0.1}, {"knn": 0.36, "linear": 0.3}]
    rows = {(row.name, row.metric): row for row in summarise({"a": first, "b": other})}
    assert rows["b", "knn"].difference == pytest.approx(0.04)
    assert rows["b", "knn"].error == pytest.approx(0.02)  # of .02 and .06
    assert rows["b", "knn"].deviation == pytest.approx(math.sqrt(2) * 0.12)
    assert rows["b", "linear"].error == pytest.approx(0.0)
    assert rows["a", "knn"].difference == 0.0
    (alone,) = [row for row in summarise({"a": first[:1]}) if row.metric == "knn"]
    assert math.isnan(alone.deviation)


@pytest.mark.parametrize("name", recipe_names("sweeps"))
def test_every_variant_of_a_shipped_sweep_is_a_configuration(name: str, tmp_path: Path) -> None:
    sweep = read_sweep(name, ["data.shards=x.tar"])
    configs = [_config(sweep, variant, seed=0, out=tmp_path) for variant in sweep.variants]
    assert len({str(config) for config in configs}) == len(configs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants is {}"),
        ({"variant": {}}, "variant is no key.*did you mean 'variants'"),
        ({"variants": {"a": 3}}, r"variants\.a is 3"),
        ({"variants": {"a b": {}, "a-b": {}}}, "names that differ"),
        ({"variants": {"a": {"model.depht": 3}}}, "model.depht"),
        ({"train": ""}, "train is ''"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(
    changes: dict[str, object], message: str, small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    file = write_file(tmp_path / "sweep.yaml", small_shards, **changes)
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) in (1, 2)

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_file_names_the_nearest() -> None:
    with pytest.raises(CmaeError, match="did you mean 'ablation_tiny'"):
        read_sweep("ablation_tyni")
    with pytest.raises(CmaeError, match="--set x: it must be key=value"):
        read_sweep("ablation_tiny", ["x"])
