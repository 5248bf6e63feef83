"""`cmae bench loader, step, kernels, e2e, all, compare`: results, tables, comparisons, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_runs import arguments

from cmae.train.commands.main import main

Capture = pytest.CaptureFixture[str]


def words(name: str, shards: str, out: Path, *more: str) -> list[str]:
    return [
        *("bench", name, *arguments(shards, out / "run"), "--out", str(out)),
        *("--batch_size", "4", "--rounds", "2", "--steps", "1", *more),
    ]


@pytest.mark.slow
def test_all_writes_a_file_and_a_table_of_each(
    small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(words("all", small_shards, tmp_path, "--peers", "false")) == 0
    found = {json.loads(path.read_text())["benchmark"] for path in tmp_path.glob("*.json")}
    assert found == {"kernels", "step", "loader", "e2e"}
    out = capsys.readouterr().out
    for path in tmp_path.glob("*.md"):
        assert path.read_text() in out
    assert "| exact | synthetic ceiling |" not in out
    assert "synthetic ceiling" in out
    assert "cores" in out


def test_a_later_run_is_compared_with_an_earlier_one(
    small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(words("step", small_shards, tmp_path, "--peers", "false")) == 0
    (path,) = tmp_path.glob("*.json")
    old = json.loads(path.read_text())
    for name in ("median", "min", "max"):
        old["rows"][0]["images_per_s"][name] *= 1000
    (tmp_path / "old").mkdir()
    faster = tmp_path / "old" / "faster.json"
    faster.write_text(json.dumps(old))
    again = words("step", small_shards, tmp_path, "--peers", "false", "--compare", str(faster))
    capsys.readouterr()
    assert main(again) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main(["bench", "compare", str(faster), str(path)]) == 1
    assert main(["bench", "compare", str(path), str(path)]) == 0


def test_json_is_all_that_stands_on_standard_output(
    small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(words("step", small_shards, tmp_path, "--peers", "false", "--json", "true")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "step"
    assert {"device", "driver", "versions", "git", "gpu"} <= result["machine"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no result file of `cmae bench`"),
        ("[]", "is no result file of `cmae bench`"),
        (
            '{"benchmark": "loader", "label": "", "machine": {"device": "x"}, "config": {}, "rows": []}',
            "a result of the benchmark 'loader', and step is measured",
        ),
    ],
)
def test_a_file_that_does_not_compare_is_refused_before_anything_is_measured(
    content: str, message: str, small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    assert main(words("step", small_shards, tmp_path / "out", "--compare", str(path))) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_shards_the_loader_says_what_is_missing(tmp_path: Path, capsys: Capture) -> None:
    assert main(["bench", "loader", *arguments("", tmp_path), "--out", str(tmp_path)]) == 1
    assert "data.shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--rounds", "0"), ("--steps", "-1"), ("--presized", "[8]")]
)
def test_values_out_of_range_are_refused_by_name(
    option: str, value: str, small_shards: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(words("loader", small_shards, tmp_path, option, value)) == 1
    assert option in capsys.readouterr().err
