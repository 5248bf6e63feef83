from __future__ import annotations

import _thread
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.loaders import VIEWS, loader_of, open_loader
from support.pipeline_data import toy_mask, write_photo_shards

from cmae.pipeline import Batch, DataError, EpochPlan, Loader, LoaderState, ViewConfig
from cmae.pipeline.formats.dataset_index import DatasetIndex, build_indices
from cmae.pipeline.sampling import epoch_plan as plan
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.views import cpu as host
from cmae.pipeline.views.cpu import CpuViews
from cmae.pipeline.views.params import draw_view_params
from cmae.pipeline.views.reference import reference_views

SIZES = (13, 20, 11, 9)  # 53 samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    paths = write_photo_shards(folder, sizes=SIZES)
    assert all(result.error is None for result in build_indices([str(path) for path in paths]))
    return folder


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("online", "target", "ids_keep", "ids_mask", "sample_id", "label"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.epoch == other.epoch
    assert one.state == other.state


def merged(batches: list[list[Batch]]) -> dict[int, tuple[torch.Tensor, ...]]:
    """By sample id: pixels, masks and label, from all ranks."""
    samples = {}
    for batch in (b for rank in batches for b in rank):
        for i, sample in enumerate(batch.sample_id.tolist()):
            assert sample not in samples
            samples[sample] = (
                batch.online[i],
                batch.target[i],
                batch.ids_keep[i],
                batch.ids_mask[i],
                batch.label[i],
            )
    return samples


def test_batch_has_the_promised_shapes_and_types(shards):
    (batch,) = take(open_loader(shards), 1)
    assert batch.online.shape == batch.target.shape == (8, 32, 32, 3)
    assert batch.online.dtype == batch.target.dtype == torch.uint8
    assert batch.ids_keep.shape == (8, 4)
    assert batch.ids_mask.shape == (8, 6)
    assert batch.sample_id.dtype == batch.label.dtype == torch.int64
    assert batch.epoch == 0
    assert batch.state == LoaderState(5, 0, 8, batch.state.digest)


def test_one_view_has_no_target(shards):
    views = ViewConfig(num_views=1, img_size=32, source_crop_size=32)
    with loader_of(shards, views, batch_size=4, global_batch_size=4, draw_mask=toy_mask) as loader:
        batch = next(loader)
    assert batch.target is None
    assert batch.online.shape == (4, 32, 32, 3)


def test_every_sample_comes_once_an_epoch_with_its_own_label(shards):
    with open_loader(shards, batch_size=53, global_batch_size=53) as loader:
        first, second = next(loader), next(loader)
    starts = np.cumsum([0, *SIZES])
    expected = [(s << 32) | p for s, size in enumerate(SIZES) for p in range(size)]
    for batch in (first, second):
        assert sorted(batch.sample_id.tolist()) == expected
        shard, record_number = batch.sample_id >> 32, batch.sample_id & 0xFFFFFFFF
        assert torch.equal(batch.label, torch.from_numpy(starts)[shard] + record_number)
    assert (first.epoch, second.epoch) == (0, 1)
    assert not torch.equal(first.sample_id, second.sample_id)


def test_views_are_the_references_of_the_samples_bytes(shards):
    (batch,) = take(open_loader(shards, batch_size=8), 1)
    for i in (0, 3, 7):
        shard, record_number = divmod(int(batch.sample_id[i]), 1 << 32)
        with tarfile.open(shards / f"part-{shard:03d}.tar") as tar:
            data = tar.extractfile(f"{shard:02d}-{record_number:03d}.jpg").read()
        edge = 64
        params = draw_view_params(
            VIEWS,
            seed=5,
            epoch=0,
            sample_id=batch.sample_id[i : i + 1].numpy(),
            height=np.array([edge + record_number % 7]),
            width=np.array([edge + shard + record_number % 5]),
        )
        online, target = reference_views(data, params, views=VIEWS)
        assert np.abs(batch.online[i].numpy().astype(int) - online).mean() < 0.5
        assert np.abs(batch.target[i].numpy().astype(int) - target).mean() < 1.0


def test_state_is_the_place_after_the_last_batch_handed_out(shards):
    with open_loader(shards, prefetch=3) as loader:
        assert loader.state == LoaderState(5, 0, 0, loader.state.digest)
        for number in range(1, 4):
            batch = next(loader)
            assert loader.state == batch.state
            assert loader.state.offset == 8 * number
        packed = json.dumps(loader.state.to_dict())
        assert LoaderState.from_dict(json.loads(packed)) == loader.state
        assert len(packed) < 125


@pytest.mark.parametrize("done", [1, 2, 5, 6, 7])
def test_resume_yields_the_same_next_batches(shards, done):
    # 53 samples are 3 steps, so 6 batches an epoch: the cases reach into the next one.
    whole = take(open_loader(shards), 10)
    state = LoaderState.from_dict(whole[done - 1].state.to_dict())
    rest = take(open_loader(shards, state=state), 10 - done)
    for one, other in zip(whole[done:], rest, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(shards, world_size):
    one = merged([take(open_loader(shards, batch_size=16), 3)])
    many = merged(
        [
            take(
                open_loader(shards, batch_size=4, rank=rank, world_size=world_size),
                12 // world_size,
            )
            for rank in range(world_size)
        ]
    )
    assert one.keys() == many.keys()
    for sample, parts in one.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, many[sample], strict=True))


def test_resume_on_more_ranks_continues_the_same_global_batches(shards):
    alone = take(open_loader(shards, batch_size=16), 3)
    state = alone[0].state
    ranks = [
        take(open_loader(shards, batch_size=4, rank=rank, world_size=4, state=state), 2)
        for rank in range(4)
    ]
    for step in (0, 1):
        ids = [i for rank in ranks for i in rank[step].sample_id.tolist()]
        assert ids == alone[1 + step].sample_id.tolist()
        assert ranks[0][step].state == alone[1 + step].state


def test_batches_handed_out_are_not_written_again(shards):
    with open_loader(shards, prefetch=1) as loader:
        batches = [next(loader) for _ in range(4)]
        copies = [(b.online.clone(), b.target.clone(), b.ids_keep.clone()) for b in batches]
        for _ in range(8):
            next(loader)
    for batch, (online, target, ids_keep) in zip(batches, copies, strict=True):
        assert torch.equal(batch.online, online)
        assert torch.equal(batch.target, target)
        assert torch.equal(batch.ids_keep, ids_keep)


@pytest.mark.parametrize("options", [{"prefetch": 4}, {"num_threads": 1}, {"num_readers": 1}])
def test_speed_settings_do_not_change_the_batches(shards, options):
    for one, other in zip(
        take(open_loader(shards), 3), take(open_loader(shards, **options), 3), strict=True
    ):
        assert_same(one, other)


def test_dali_and_cpu_give_the_same_samples_and_nearly_the_same_pixels(shards):
    cpu, dali = take(open_loader(shards), 4), take(open_loader(shards, view_backend="dali"), 4)
    for one, other in zip(cpu, dali, strict=True):
        assert torch.equal(one.sample_id, other.sample_id)
        assert torch.equal(one.ids_keep, other.ids_keep)
        assert (one.online.int() - other.online.int()).abs().float().mean() < 0.5


def test_two_loaders_in_one_process_do_not_disturb_each_other(shards):
    expected = take(open_loader(shards), 6)
    with open_loader(shards) as one, open_loader(shards) as other:
        for batch in expected:
            assert_same(next(one), batch)
            assert_same(next(other), batch)


def test_close_joins_all_threads_and_may_be_called_again(shards):
    before = set(threading.enumerate())
    loader = open_loader(shards)
    next(loader)
    assert len(threading.enumerate()) > len(before)
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_what_is_open_is_closed_when_a_later_part_cannot_be_had(shards, monkeypatch):
    closed = []
    monkeypatch.setattr(IndexedSource, "close", lambda self: closed.append("source"))
    monkeypatch.setattr(CpuViews, "close", lambda self: closed.append("views"))
    with pytest.raises(ZeroDivisionError):
        open_loader(shards, wrap=lambda source, view_backend: 1 / 0)
    assert closed == ["views", "source"]


def test_a_dropped_loader_closes_itself(shards):
    before = set(threading.enumerate())
    next(open_loader(shards))
    assert set(threading.enumerate()) <= before


def test_num_threads_of_torch_are_left_alone(shards):
    before = torch.get_num_threads()
    with open_loader(shards) as loader:
        next(loader)
        assert torch.get_num_threads() == before
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert seen == [before]


def test_an_error_in_the_background_comes_out_of_next(shards):
    def broken(sample_id, epoch):
        if epoch == 1:
            raise KeyError("no mask for epoch 1")
        return toy_mask(sample_id, epoch)

    with loader_of(shards, VIEWS, batch_size=16, global_batch_size=48, draw_mask=broken) as loader:
        for _ in range(3):
            next(loader)
        for _ in range(2):
            with pytest.raises(KeyError, match="no mask for epoch 1"):
                next(loader)


def test_a_shard_that_vanishes_is_named(tmp_path):
    (path,) = write_photo_shards(tmp_path, sizes=[16])
    build_indices([str(path)])
    index = DatasetIndex.load([path])
    source = IndexedSource(index, plan=EpochPlan(16, 4), rank=0, world_size=1, batch_size=4)
    path.unlink()
    with pytest.raises(DataError, match=r"part-000\.tar .*No such file"):
        next(source.batches(LoaderState(0, 0, 0, index.digest)))
    source.close()


def test_many_shards_are_read_with_few_open_files(tmp_path):
    paths = write_photo_shards(tmp_path, sizes=[1] * 100, edge=20)
    build_indices([str(path) for path in paths])
    before = len(list(Path("/proc/self/fd").iterdir()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 80, limits[1]))
    try:
        with open_loader(tmp_path, batch_size=50, global_batch_size=50) as loader:
            for _ in range(4):
                next(loader)
            assert len(list(Path("/proc/self/fd").iterdir())) < before + 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_ctrl_c_interrupts_a_blocked_next(shards):
    release = threading.Event()

    def stuck(sample_id, epoch):
        release.wait(30)
        return toy_mask(sample_id, epoch)

    loader = loader_of(shards, VIEWS, batch_size=8, global_batch_size=8, draw_mask=stuck)
    # A shell's background job is born with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, _thread.interrupt_main)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(loader)
    finally:
        signal.signal(signal.SIGINT, before)
    release.set()
    loader.close()


def test_a_program_that_forgets_to_close_ends_cleanly(shards):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from support.loaders import open_loader
loaders = [open_loader({str(shards)!r}), open_loader({str(shards)!r}, view_backend="dali")]
print([next(loader).state.offset for loader in loaders])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "[8, 8]"
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_loader_says_how_large_its_data_is(shards):
    with open_loader(shards) as loader:
        next(loader)
        assert loader.num_samples == 53
        assert loader.steps_per_epoch == 3
        assert loader.bad_samples == 0
        assert loader.wait_s > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 20}, r"global_batch_size=20 must be a multiple of .* 1 \* 8"),
        ({"global_batch_size": 64}, r"global_batch_size=64 .* num_samples=53"),
        ({"rank": 2, "world_size": 2}, r"rank=2"),
        ({"source": "tar"}, r"source is 'tar'"),
        ({"view_backend": "pil"}, r"view_backend is 'pil'"),
        ({"state": LoaderState(4, 0, 0, "x")}, r"seed=4, the loader seed=5"),
        ({"state": LoaderState(5, 0, 0, "x")}, r"digest x"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction is 2\.0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(shards, options, message):
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match=message):
        open_loader(shards, **options)
    assert set(threading.enumerate()) <= before


# --- stream -----------------------------------------------------------------------------------------------


def test_stream_and_index_give_a_sample_the_same_views_masks_and_label(shards):
    indexed = merged([take(open_loader(shards, batch_size=53, global_batch_size=53), 1)])
    stream = merged(
        [take(open_loader(shards, batch_size=53, global_batch_size=53, source="stream"), 1)]
    )
    assert indexed.keys() == stream.keys()
    for sample, parts in indexed.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, stream[sample], strict=True))


def test_auto_takes_the_stream_when_an_index_is_missing(tmp_path):
    paths = write_photo_shards(tmp_path, sizes=[8, 8])
    build_indices([str(paths[0])])
    with open_loader(tmp_path) as loader:
        assert loader.steps_per_epoch is None
        assert loader.num_samples is None
        next(loader)
    with pytest.raises(FileNotFoundError, match="cmae shards index"):
        open_loader(tmp_path, source="indexed")


def test_stream_reads_pipes(shards):
    urls = [f"pipe:cat {path}" for path in sorted(shards.glob("*.tar"))]
    piped = merged([take(open_loader(urls, batch_size=53, global_batch_size=53), 1)])
    direct = merged([take(open_loader(shards, batch_size=53, global_batch_size=53), 1)])
    assert piped.keys() == direct.keys()
    assert all(torch.equal(piped[sample][0], direct[sample][0]) for sample in piped)


def test_a_pipe_that_fails_is_written_down_and_the_other_shards_go_on(shards, tmp_path):
    path = min(shards.glob("*.tar"))
    ledger = tmp_path / "bad.jsonl"
    with open_loader([f"pipe:cat {path}", "pipe:exit 3"], source="stream", ledger=ledger) as loader:
        assert {i >> 32 for i in next(loader).sample_id.tolist()} == {0}
        for _ in range(3):
            next(loader)
    assert "exit 3" in ledger.read_text()


def test_the_ledger_holds_no_command_of_a_pipe_that_fails(shards, tmp_path):
    path, ledger = min(shards.glob("*.tar")), tmp_path / "bad.jsonl"
    pipe = "pipe:false 'SE\"CRET' /data/x.tar || exit 3"
    with open_loader([f"pipe:cat {path}", pipe], source="stream", ledger=ledger) as loader:
        for _ in range(4):
            next(loader)
    assert "CRET" not in ledger.read_text()
    assert "ended with exit 3" in ledger.read_text()
    assert "pipe:false *** x.tar" in ledger.read_text()


def test_local_streams_are_read_where_webdataset_may_run_no_command(shards, monkeypatch):
    import webdataset.utils

    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    with open_loader(shards, source="stream") as loader:
        assert len(next(loader).sample_id)
    with pytest.raises(DataError, match="unsafe_gopen"):
        next(open_loader([f"pipe:cat {min(shards.glob('*.tar'))}"], source="stream"))


def test_stream_deals_whole_shards_to_ranks(shards):
    options = {"source": "stream", "world_size": 2, "batch_size": 4, "global_batch_size": 8}
    seen = [take(open_loader(shards, rank=rank, **options), 4) for rank in (0, 1)]
    by_rank = [
        {int(i) >> 32 for batch in rank for i in batch.sample_id if batch.epoch == 0}
        for rank in seen
    ]
    assert not by_rank[0] & by_rank[1]


def test_stream_resumes_at_the_shard_and_says_so(shards, caplog):
    options = {"source": "stream", "batch_size": 4, "global_batch_size": 4}
    with caplog.at_level(logging.WARNING):
        whole = take(open_loader(shards, **options), 8)
    assert caplog.text.count("resume is by shard") == 1
    state = next(batch.state for batch in whole if batch.state.offset == 1)
    rest = take(open_loader(shards, state=state, **options), 2)
    shard_order = list(dict.fromkeys(int(i) >> 32 for b in whole for i in b.sample_id))
    assert {int(i) >> 32 for i in rest[0].sample_id} == {shard_order[1]}


def test_stream_shuffles_inside_a_shard_and_differently_each_epoch(shards):
    options = {"source": "stream", "batch_size": 53, "global_batch_size": 53}
    first, second = take(open_loader(shards, **options), 2)
    assert first.sample_id.tolist() != second.sample_id.tolist()
    assert sorted(first.sample_id.tolist()) == sorted(second.sample_id.tolist())
    (still,) = take(open_loader(shards, shuffle=False, **options), 1)
    assert still.sample_id.tolist() == sorted(still.sample_id.tolist())


def test_stream_with_fewer_shards_than_ranks_is_refused(shards):
    with pytest.raises(ValueError, match=r"4 for world_size=8 ranks.*cmae shards index"):
        open_loader(shards, source="stream", world_size=8, batch_size=2)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
def test_a_loader_leaves_the_callers_threads_alone(tmp_path):
    (shard,) = write_photo_shards(tmp_path, sizes=[8])
    program = f"""
import torch
from cmae.pipeline import LoaderConfig, ViewConfig, build_loader
views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
with build_loader(LoaderConfig({str(shard)!r}, batch_size=4, views=views)) as loader:
    next(loader)
    print(torch.get_num_threads())
"""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2"], done.stderr


def test_the_next_epochs_order_is_made_in_the_background(shards, monkeypatch):
    made = []
    shuffle = plan._shuffle_windows

    def noted(epoch_plan, order, epoch):
        made.append((epoch, threading.current_thread().name))
        return shuffle(epoch_plan, order, epoch)

    monkeypatch.setattr(plan, "_shuffle_windows", noted)
    with open_loader(shards, seed=77) as loader:
        next(loader)
        time.sleep(0.1)
        assert next(batch for batch in loader if batch.epoch == 1).state.offset == 8
    threads = dict(reversed(made))  # of the first to make each order
    assert threads[0] == "cmae-prefetch"
    assert threads[1].startswith("cmae-read")


def test_small_batches_keep_all_threads_busy(shards, monkeypatch):
    """Images of very different cost: two batches in flight would leave most threads without work."""
    slow = iter(range(10**9))

    def make(self, encoded, params, *, row, online, target):
        time.sleep(0.04 if next(slow) % 4 == 0 else 0.004)
        return True

    monkeypatch.setattr(host._Worker, "make", make)
    with open_loader(shards, batch_size=2, global_batch_size=2, num_threads=8) as loader:
        list(islice(loader, 10))
        before = loader.snapshot()
        list(islice(loader, 100))
        views = (loader.snapshot() - before).stages["decode_augment"]
    assert views.busy_s > 0.6 * (views.busy_s + views.starved_s)


def test_the_training_thread_pays_little_for_a_batch(tmp_path):
    write_photo_shards(tmp_path, sizes=[256], edge=24)
    build_indices([str(path) for path in tmp_path.glob("*.tar")])
    spent = []
    with open_loader(tmp_path, batch_size=256, global_batch_size=256, prefetch=2) as loader:
        batch = next(loader)
        for _ in range(8):
            deadline = time.monotonic() + 20
            while loader.snapshot().stages["prefetch"].items < 256 * (len(spent) + 3):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            start = time.thread_time()
            batch = next(loader)
            spent.append(time.thread_time() - start)
    assert len(batch.label) == 256
    assert sorted(spent)[4] < 2e-3  # 0.1 ms on a free core; per-sample work would be 10 ms
