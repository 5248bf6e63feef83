"""In which order an epoch plan comes to need the shards."""

from __future__ import annotations

import numpy as np

from cmae.pipeline.batch import LoaderState
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.sampling.epoch_plan import EpochPlan


def order_of_use(index: DatasetIndex, plan: EpochPlan, state: LoaderState | None) -> list[int]:
    """Shard numbers in the order in which the plan first needs them, from `state` on."""
    epoch, start = (0, 0) if state is None else (state.epoch, state.offset)
    upcoming = np.concatenate([plan.order(epoch)[start:], plan.order(epoch)[:start]])
    shards, first = np.unique(index.locate(upcoming)[0], return_index=True)
    return [int(shard) for shard in shards[np.argsort(first)]]
