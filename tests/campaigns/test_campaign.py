"""The campaign's short form: one fault each of the most frequent kinds, and what a loss looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.faults import FAULTS
from tests.campaigns.run import Result, campaign, table
from tests.campaigns.trial import Run, differences, write_shards


@pytest.mark.slow
def test_a_short_campaign_loses_nothing(tmp_path: Path) -> None:
    names = ["kill -9", "SIGTERM", "torn checkpoint"]
    results = campaign(names, count=len(names), seed=0, work=tmp_path, jobs=2)
    assert [result.lost for result in results] == [[]] * len(names)
    assert all(result.starts >= 2 for result in results)


@pytest.mark.slow
def test_another_seed_is_a_difference(tmp_path: Path) -> None:
    """The comparison can fail: a campaign that compared nothing would find nothing."""
    shards = write_shards(tmp_path / "shards")
    outs = []
    for seed in (0, 1):
        run = Run(shards, tmp_path / str(seed) / "run", FAULTS["kill -9"].kind)
        run.kind = type(run.kind)(settings={"seed": seed, "optim.total_steps": 2})
        run.finish(most=1)
        outs.append(run.out)
    found = differences(*outs)
    assert {"model", "optimizer", "loader"} <= set(found)
    assert any(line.startswith("metrics") for line in found)
    assert differences(outs[0], outs[0]) == []


def test_the_table_names_what_was_lost() -> None:
    results = [
        Result("kill -9", 1, "step", 2, []),
        Result("kill -9", 2, "start", 2, ["model"]),
    ]
    assert "| kill -9 | 2 | 2.0 | 1 times: model |" in table(results)
