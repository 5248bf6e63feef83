"""Costs of single operations: a cost that is put into one operation is found in that one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmae.pipeline import LoaderState, ViewConfig
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.images.jpeg import JpegKind
from cmae.pipeline.sampling.epoch_plan import EpochPlan
from cmae.pipeline.sources.expand import expand_shards
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.records import RawBatch
from cmae.pipeline.views.color_image import ImageColor
from cmae.train.loop.loader_settings import LoaderSettings
from cmae.train.profiling.analysis.records import Operation
from cmae.train.profiling.measure import operations
from cmae.train.profiling.measure.operations import measure_operations, measure_slow_images

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8, jitter_prob=1.0)
SETTINGS = LoaderSettings(num_threads=1, prefetch=2, num_readers=1, hw_decoder_load=0.0)
COLORS = ["colour jitter", "grayscale", "blur"]


@pytest.fixture
def recorded(small_shards: str) -> list[RawBatch]:
    index = DatasetIndex.load(expand_shards(small_shards))
    plan = EpochPlan(len(index), 8, seed=0)
    source = IndexedSource(index, plan=plan, rank=0, world_size=1, batch_size=8, num_readers=1)
    batches = source.batches(LoaderState(0, epoch=0, offset=0, digest=source.digest))
    kept = [next(batches) for _ in range(3)]
    source.close()
    return kept


def measure(
    recorded: list[RawBatch], views: ViewConfig = VIEWS, backend: str = "cpu"
) -> dict[str, Operation]:
    found = measure_operations(
        views, recorded, device=torch.device("cpu"), backend=backend, settings=SETTINGS, rounds=2
    )
    return {one.name: one for one in found}


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_operations_come_in_order_and_decoding_costs_something(
    recorded: list[RawBatch], backend: str
) -> None:
    found = measure(recorded, backend=backend)
    assert list(found) == ["decode", "resize, flip", "crop", *COLORS]
    assert found["decode"].cpu_ms.value > 0
    assert found["decode"].cpu_ms.n == 2


def test_a_cost_is_found_in_its_operation(
    recorded: list[RawBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    jitter, spent = ImageColor._jitter, []

    def slow(*arguments: object) -> None:
        spent.append(2**-8)  # s; sums of it are exact, however many there are
        jitter(*arguments)

    monkeypatch.setattr(ImageColor, "_jitter", slow)
    # CPU time is what was spent here, so that other work on the machine cannot be seen.
    monkeypatch.setattr(operations, "process_cpu_s", lambda: sum(spent))
    costs = {name: one.cpu_ms.value for name, one in measure(recorded).items()}
    assert costs.pop("colour jitter") == pytest.approx(1000 * 2**-8)
    assert list(costs.values()) == pytest.approx([0.0] * len(costs))


def test_images_are_timed_by_kind_and_size_the_slowest_first(recorded: list[RawBatch]) -> None:
    odd = recorded[0].records[0]
    recorded[0].records[0] = replace(odd, kind=JpegKind.PROGRESSIVE)
    recorded[0].records[1] = replace(odd, height=2000, width=3000)
    rows = measure_slow_images(
        VIEWS, recorded, device=torch.device("cpu"), backend="auto", settings=SETTINGS
    )
    found = {(one["jpeg_kind"], one["megapixels"], one["megapixels_up_to"]): one for one in rows}
    assert {key: one["items"] for key, one in found.items()} == {
        ("baseline", 0.0, 0.1): 22,
        ("progressive", 0.0, 0.1): 1,
        ("baseline", 4.0, None): 1,
    }
    times = [one["ms"] for one in rows]
    assert times == sorted(times, reverse=True)
    assert min(times) > 0


def test_colours_that_are_off_are_no_operation(recorded: list[RawBatch]) -> None:
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8, color="none")
    assert not set(measure(recorded, views)) & set(COLORS)


def test_files_that_cannot_be_decoded_are_left_out(recorded: list[RawBatch]) -> None:
    for raw in recorded:
        raw.records[0].data[:] = 0
    assert measure(recorded) == {}
