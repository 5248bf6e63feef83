"""Killed anywhere and continued on any number of ranks, an epoch holds the same samples, views and masks."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.loaders import loader_of
from support.pipeline_data import toy_mask, write_photo_shards

from cmae.pipeline import EpochPlan, LoaderState, ViewConfig
from cmae.pipeline.formats.dataset_index import DatasetIndex, build_indices
from cmae.pipeline.sampling import epoch_plan as plan_module
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.views.params import draw_view_params

VIEWS = ViewConfig(img_size=16, source_crop_size=16, target_shift=0)
SIZES = (61, 80, 45, 24)  # 210 uneven shards
WORLDS = (1, 2, 3, 4, 8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = write_photo_shards(tmp_path_factory.mktemp("shards"), sizes=SIZES, edge=16)
    assert all(result.error is None for result in build_indices([str(path) for path in paths]))
    return paths


# --- plan and source ---------------------------------------------------------------------------------------


def ids_of_epoch(
    index: DatasetIndex, plan: EpochPlan, start: LoaderState, *, world_size: int, batch_size: int
) -> Iterator[tuple[np.ndarray, LoaderState]]:
    """Sample ids of all ranks side by side, and the state after, for each micro-batch left in the epoch."""
    place = {"world_size": world_size, "batch_size": batch_size, "num_readers": 1}
    sources = [
        IndexedSource(index, plan=plan, rank=rank, check_crc=False, **place)
        for rank in range(world_size)
    ]
    readers = [source.batches(start) for source in sources]
    try:
        while True:
            raws = [next(reader) for reader in readers]
            assert len({(raw.epoch, raw.state) for raw in raws}) == 1  # equal on every rank
            if raws[0].epoch != start.epoch:
                return
            yield np.concatenate([raw.sample_id for raw in raws]), raws[0].state
    finally:
        for source in sources:
            source.close()


@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_and_any_number_of_ranks_give_the_rest_of_the_epoch(shards, data):
    index = DatasetIndex.load(shards)
    first, then = data.draw(st.sampled_from(WORLDS)), data.draw(st.sampled_from(WORLDS))
    global_batch_size = int(np.lcm(first, then)) * data.draw(st.integers(1, 8))
    assume(global_batch_size <= len(index))
    epoch = data.draw(st.integers(0, 5))
    last_batch = data.draw(st.sampled_from(["drop", "pad"]))
    plan = EpochPlan(
        len(index), global_batch_size, seed=3, block_size=8, window_size=64, last_batch=last_batch
    )
    share = {world: global_batch_size // world for world in (first, then)}
    micro = {
        world: data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        for world, n in share.items()
    }
    begin = LoaderState(3, epoch, 0, index.digest)
    whole = index.sample_id(
        np.take(plan.order(epoch), np.arange(plan.samples_per_epoch), mode="wrap")
    )
    # Killed after any number of samples; the checkpoint is from the last whole step before.
    killed_after = data.draw(st.integers(0, plan.samples_per_epoch - 1))
    steps = killed_after // global_batch_size
    per_step = share[first] // micro[first]
    done = list(
        islice(
            ids_of_epoch(index, plan, begin, world_size=first, batch_size=micro[first]),
            steps * per_step,
        )
    )
    state = done[-1][1] if done else begin
    rest = list(ids_of_epoch(index, plan, state, world_size=then, batch_size=micro[then]))
    seen = np.concatenate([ids for ids, _ in done + rest])
    assert np.array_equal(seen, whole)
    if last_batch == "drop":
        assert len(np.unique(seen)) == len(seen)
    else:
        assert len(np.unique(seen)) == len(index)
        again = index.sample_id(plan.padding(epoch))
        assert np.array_equal(seen[len(index) :], again)
    assert len(rest) == (plan.steps_per_epoch - steps) * share[then] // micro[then]
    assert rest[-1][1] == LoaderState(3, epoch + 1, 0, index.digest)


@given(
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=24, unique=True),
    epoch=st.integers(0, 400),
    parts=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_views_of_a_sample_do_not_depend_on_its_batch(ids, epoch, parts):
    sample_id = np.array(ids, dtype=np.int64)
    size = 32 + sample_id % 50

    def draw(rows):
        return draw_view_params(
            VIEWS,
            seed=1,
            epoch=epoch,
            sample_id=sample_id[rows],
            height=size[rows].astype(np.int32),
            width=size[rows].astype(np.int32),
        ).matrix()

    together = draw(slice(None))
    apart = np.concatenate(
        [draw(rows) for rows in np.array_split(np.arange(len(ids)), parts) if len(rows)]
    )
    assert np.array_equal(together, apart)


def test_inside_a_global_batch_only_a_grid_that_reaches_its_end_may_go_on(shards):
    options = {"draw_mask": toy_mask, "global_batch_size": 48, "num_threads": 1}
    with loader_of(shards, VIEWS, batch_size=4, world_size=4, **options) as loader:
        next(loader)
        state = loader.state
    assert state.offset == 16
    # 16 more, twice.
    with loader_of(shards, VIEWS, batch_size=8, world_size=2, state=state, **options) as loader:
        assert [next(loader).state.offset for _ in range(2)] == [32, 48]
    with pytest.raises(ValueError, match=r"offset=16.*global batch of 48; 24 ="):
        loader_of(shards, VIEWS, batch_size=8, world_size=3, state=state, **options)


def test_ranks_that_do_not_divide_the_global_batch_are_refused(shards):
    with pytest.raises(ValueError, match=r"global_batch_size=32 must be a multiple of .* 3 \* 8"):
        loader_of(
            shards, VIEWS, batch_size=8, global_batch_size=32, world_size=3, draw_mask=toy_mask
        )


def test_state_is_under_125_bytes_as_stored():
    typical = LoaderState(0, 299, 1_277_952, "0123456789abcdef")
    extreme = LoaderState(2**63 - 1, 10**5, 10**12, "0123456789abcdef")
    for state in (typical, extreme):
        packed = json.dumps(state.to_dict(), separators=(",", ":"))
        assert len(packed) < 125
        assert LoaderState.from_dict(json.loads(packed)) == state
    # As torch.save writes it inside a checkpoint.
    assert len(pickle.dumps(typical.to_dict(), protocol=2)) < 125


# --- the whole loader --------------------------------------------------------------------------------------


def samples_of(
    shards: list[Path], steps: int, *, world_size: int, state: LoaderState | None, **options
) -> tuple[dict[int, tuple[torch.Tensor, ...]], LoaderState]:
    """Views and masks of `steps` global batches of 24, from all ranks."""
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    for rank in range(world_size):
        with loader_of(
            shards,
            VIEWS,
            batch_size=24 // world_size,
            global_batch_size=24,
            rank=rank,
            world_size=world_size,
            state=state,
            seed=9,
            num_threads=1,
            draw_mask=toy_mask,
            **options,
        ) as loader:
            for batch in islice(loader, steps):
                for row, sample in enumerate(batch.sample_id.tolist()):
                    assert sample not in seen
                    seen[sample] = (batch.online[row], batch.target[row], batch.ids_keep[row])
        last = batch.state if steps else state
    return seen, last


def test_an_epoch_in_pieces_on_1_2_3_4_and_8_ranks_is_the_whole_one(shards):
    whole, end = samples_of(shards, 8, world_size=1, state=None)  # 8 steps of 24: 192 of 210
    pieces: dict[int, tuple[torch.Tensor, ...]] = {}
    state = None
    for world_size, steps in ((8, 1), (3, 2), (1, 1), (4, 2), (2, 2)):
        part, state = samples_of(shards, steps, world_size=world_size, state=state)
        assert not part.keys() & pieces.keys()
        pieces |= part
    assert state == end == LoaderState(9, 1, 0, end.digest)
    assert pieces.keys() == whole.keys()
    for sample, parts in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, pieces[sample], strict=True))


def test_with_pad_every_sample_comes_and_all_ranks_take_as_many_steps(shards):
    options = {"batch_size": 8, "global_batch_size": 24, "world_size": 3, "last_batch": "pad"}
    counts, seen = [], []
    for rank in range(3):
        with loader_of(
            shards, VIEWS, rank=rank, draw_mask=toy_mask, num_threads=1, **options
        ) as loader:
            assert loader.steps_per_epoch == 9
            batches = list(islice(loader, 10))
        counts.append([batch.epoch for batch in batches])
        seen += [i for batch in batches[:9] for i in batch.sample_id.tolist()]
    assert counts == [[0] * 9 + [1]] * 3
    assert len(seen) == 216
    assert len(set(seen)) == 210


def test_pad_needs_an_index(shards):
    with pytest.raises(ValueError, match="last_batch='pad' needs to know"):
        loader_of(
            shards,
            VIEWS,
            batch_size=8,
            global_batch_size=8,
            draw_mask=toy_mask,
            source="stream",
            last_batch="pad",
        )


# --- epoch boundaries --------------------------------------------------------------------------------------


def test_the_next_epochs_order_is_made_in_the_background_before_it_is_needed(shards, monkeypatch):
    made: dict[int, str] = {}
    real = plan_module._order.__wrapped__

    def slow(plan, epoch):
        made[epoch] = threading.current_thread().name
        time.sleep(0.3)
        return real(plan, epoch)

    monkeypatch.setattr(plan_module, "_order", plan_module.lru_cache(maxsize=4)(slow))
    with loader_of(
        shards,
        VIEWS,
        batch_size=30,
        global_batch_size=30,
        draw_mask=toy_mask,
        num_threads=1,
        seed=77,
    ) as loader:
        next(loader)
        time.sleep(0.5)  # the first step: 7 of them make an epoch
        assert 1 in made
        for _ in range(3):
            for batch in loader:
                time.sleep(0.05)
                if batch.state.offset == 0:
                    break
            assert made.keys() >= {batch.epoch + 1}
    # The first order of all is waited for; every other one is made by a reading thread.
    assert made.pop(0) == "cmae-prefetch"
    assert all(name.startswith("cmae-read") for name in made.values())


def made(loader):
    return loader.snapshot().stages["prefetch"].items


def test_batches_of_the_next_epoch_are_read_before_this_one_ends(shards):
    with loader_of(
        shards, VIEWS, batch_size=30, global_batch_size=30, draw_mask=toy_mask, num_threads=1
    ) as loader:
        for _ in range(6):  # of 7
            next(loader)
        deadline = time.monotonic() + 20
        while made(loader) < 8 * 30 and time.monotonic() < deadline:
            time.sleep(0.02)
        # Two batches are ready beyond those handed out: the last of this epoch and the first of the next.
        assert made(loader) >= 8 * 30
        assert next(loader).epoch == 0
        assert next(loader).epoch == 1
