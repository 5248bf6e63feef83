"""The campaign's short form: one fault each of the most frequent kinds, and what a loss looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import run

from tests.campaigns.run import Result, campaign, table
from tests.campaigns.trial import differences


@pytest.mark.slow
def test_a_short_campaign_loses_nothing(tmp_path: Path) -> None:
    names = ["kill -9", "torn checkpoint"]
    results = campaign(names, count=len(names), seed=0, work=tmp_path, jobs=2)
    assert [result.lost for result in results] == [[]] * len(names)
    assert all(result.starts >= 2 for result in results)


def test_another_seed_is_a_difference(small_shards: str, tmp_path: Path) -> None:
    """The comparison can fail: a campaign that compared nothing would find nothing."""
    outs = [tmp_path / str(seed) for seed in (0, 1)]
    for seed, out in enumerate(outs):
        run(small_shards, out, **{"seed": seed, "optim.total_steps": 2})
    found = differences(*outs)
    assert {"model", "optimizer", "loader"} <= set(found)
    assert any(line.startswith("metrics") for line in found)
    assert differences(outs[0], outs[0]) == []
    lines = (outs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (outs[0] / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert differences(outs[0], outs[0]) == []
    assert any(line.startswith("metrics") for line in differences(outs[0], outs[1], rounding=9e9))


def test_the_table_names_what_was_lost() -> None:
    results = [
        Result("kill -9", 1, "step", 2, []),
        Result("kill -9", 2, "start", 2, ["model"]),
    ]
    assert "| kill -9 | 2 | 2.0 | 1 times: model |" in table(results)
