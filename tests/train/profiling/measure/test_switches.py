"""Where encoded files come from can be switched while the loader runs."""

from __future__ import annotations

import numpy as np
import pytest
from support.profiling_runs import open_quick, quick_config

from cmae.pipeline.sources.indexed import IndexedSource
from cmae.train.profiling.measure.switches import SwitchedSource
from cmae.train.profiling.measure.trials import override


def test_upcoming_extents_hold_the_bytes_that_are_read(small_shards: str) -> None:
    with open_quick(small_shards) as subject:
        source = subject.source
        extents, after = source.upcoming(subject.start, 2)
        first = source.read(subject.start)
        second = source.read(source.upcoming(subject.start, 1)[1])
        records = [*first.records, *second.records]
        for extent, record in zip(extents, records, strict=True):
            with open(extent.path, "rb") as file:
                file.seek(extent.byte_offset)
                assert file.read(extent.size) == record.data.tobytes()
        assert second.state == after


def test_memory_gives_again_what_storage_gave(small_shards: str) -> None:
    with open_quick(small_shards) as subject:
        inner = subject.source.inner
        assert isinstance(inner, IndexedSource)
        source = SwitchedSource(inner)
        number = source.switch("storage", record=True)
        batches = source.batches(subject.start)
        seen = [next(batches) for _ in range(3)]
        assert {raw.state.epoch for raw in seen} == {number}
        again = source.switch("memory")
        replayed = [next(batches) for _ in range(4)]
        assert {raw.state.epoch for raw in replayed} == {again}
        for raw, other in zip([*seen, seen[0]], replayed, strict=True):
            assert np.array_equal(raw.sample_id, other.sample_id)
            pairs = zip(raw.encoded, other.encoded, strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)


def test_overrides_reach_nested_settings_and_refuse_unknown_ones(small_shards: str) -> None:
    config = quick_config(small_shards)
    changed = override(config, {"speed.num_threads": 3, "data.views.color": "fast"})
    assert (changed.speed.num_threads, changed.data.views.color) == (3, "fast")
    with pytest.raises(ValueError, match=r"speed\.num_thread is no setting"):
        override(config, {"speed.num_thread": 3})
