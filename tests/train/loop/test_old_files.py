"""Files that the first version wrote: this one reads them, and a run goes on from them bit for bit.

tests/data/v1 holds a shard, its index, the recipe of a run, that run's checkpoint after 4 of 8 steps, and the
metrics of its other steps; all were written by the first version.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmae.pipeline import LoaderState
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.train import load_recipe, pretrain

V1 = Path(__file__).parents[2] / "data" / "v1"


def test_the_index_loads():
    index = DatasetIndex.load([str(V1 / "v1.tar")])
    assert len(index) == 12
    assert [index.key(0, number) for number in (0, 11)] == ["s00", "s11"]


def test_the_place_of_a_checkpoint_loads_without_its_unit():
    stored = torch.load(V1 / "v1.pt", weights_only=True)["loader"]
    state = LoaderState.from_dict(stored)
    assert (state.epoch, state.offset, state.unit) == (1, stored["next_sample"], "unstated")


def test_a_run_goes_on_from_the_checkpoint_bit_for_bit(tmp_path):
    overrides = {
        "data.shards": str(V1 / "v1.tar"),
        "run.out": str(tmp_path),
        "run.resume": str(V1 / "v1.pt"),
    }
    threads = torch.get_num_threads()
    try:
        with pytest.warns(UserWarning, match=r"speed\.num_threads is data\.num_threads now"):
            config = load_recipe(V1 / "recipe.yaml", overrides=overrides)
        pretrain(config)
    finally:
        torch.set_num_threads(threads)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = json.loads((V1 / "losses.json").read_text())
    records = [json.loads(line) for line in lines]
    assert [one["step"] for one in records] == [5, 6, 7, 8]
    for record, before in zip(records, expected, strict=True):
        assert record | before == record
