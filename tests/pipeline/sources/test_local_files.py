"""Local files that behave like network ones: short reads, handles that go stale, shards that are replaced."""

from __future__ import annotations

import errno
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from support.pipeline_data import write_photo_shards

from cmae.pipeline import DataError, EpochPlan, LoaderState
from cmae.pipeline.formats.dataset_index import DatasetIndex, Place, build_indices
from cmae.pipeline.formats.shard_index import tar_digest
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.local_files import OpenFiles
from cmae.pipeline.sources.shard_reader import LostShard


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = write_photo_shards(tmp_path, sizes=[8, 8])
    build_indices([str(path) for path in paths])
    return paths


def open_files(shards: list[Path], **options) -> OpenFiles:
    digests = [tar_digest(path) for path in shards]
    return OpenFiles(
        [str(path) for path in shards], digests=digests, first_delay_s=0.001, **options
    )


def read(files: OpenFiles, number: int, *, offset: int = 100, size: int = 5000) -> bytes:
    (data,) = files.read_batch([Place(number, offset, size)], np.empty(size, np.uint8))
    return data.tobytes()


class FlakyReads:
    """Stands in for `os.preadv`: the next calls fail or come short."""

    def __init__(self, *outcomes: int, limit: int | None = None) -> None:
        self.outcomes = list(outcomes)
        self.limit = limit
        self.handles: list[int] = []
        self.real = os.preadv

    def __call__(self, handle: int, buffers: list[memoryview], offset: int) -> int:
        self.handles.append(handle)
        if self.outcomes:
            number = self.outcomes.pop(0)
            raise OSError(number, os.strerror(number))
        return self.real(handle, [buffers[0][: self.limit]], offset)


def test_short_reads_are_put_together(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", FlakyReads(limit=700))
    assert read(open_files(shards), 0) == shards[0].read_bytes()[100:5100]


def test_a_read_past_the_end_gives_what_there_is(shards: list[Path]) -> None:
    size = shards[0].stat().st_size
    assert read(open_files(shards), 0, offset=size - 10) == shards[0].read_bytes()[-10:]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_stale_handle_is_opened_again(
    shards: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    flaky = FlakyReads(number, number)
    monkeypatch.setattr(os, "preadv", flaky)
    expected = shards[1].read_bytes()[100:5100]
    opened = []
    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **kw: opened.append(path) or real_open(path, *args, **kw)
    )
    assert read(open_files(shards), 1) == expected
    assert opened == [shards[1]] * 3
    assert "part-001.tar" in caplog.text


def test_a_shard_with_an_error_that_stays_is_lost(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = FlakyReads(*[errno.EIO] * 100)
    monkeypatch.setattr(os, "preadv", flaky)
    files = open_files(shards)
    place, buffer = Place(0, 100, 5000), np.empty(10_000, np.uint8)
    lost = LostShard("the shard cannot be read: Input/output error, 6 times in a row")
    assert list(files.read_batch([place, place], buffer)) == [lost, lost]
    assert len(flaky.handles) == 6  # the second is not tried


def test_an_error_that_waiting_cannot_mend_is_raised_at_once(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = FlakyReads(errno.EINVAL)
    monkeypatch.setattr(os, "preadv", flaky)
    with pytest.raises(
        DataError, match=r"part-000\.tar cannot be .*Invalid argument.*this machine"
    ):
        read(open_files(shards), 0)
    assert len(flaky.handles) == 1


def test_a_replaced_shard_is_found_when_it_is_opened_again(shards: list[Path]) -> None:
    files = open_files(shards, max_open=1)
    read(files, 0)
    shards[0].unlink()
    shards[0].write_bytes(shards[1].read_bytes())
    read(files, 1)  # closes the other
    with pytest.raises(DataError, match=r"part-000\.tar was replaced during the run: \d+ bytes of"):
        read(files, 0)


def test_a_copy_of_the_same_contents_is_welcome(
    shards: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    files = open_files(shards, max_open=1)
    before = read(files, 0)
    copy = shards[0].with_suffix(".copy")
    copy.write_bytes(shards[0].read_bytes())
    os.utime(copy, (1, 1))
    copy.replace(shards[0])
    read(files, 1)
    assert read(files, 0) == before
    assert "replaced by a file of the same contents" in caplog.text
    caplog.clear()
    read(files, 1)
    read(files, 0)
    assert not caplog.text


@pytest.mark.parametrize("keeps_size", [True, False])
def test_a_shard_overwritten_in_place_ends_the_run_at_the_first_bad_record(
    shards: list[Path], keeps_size: bool
) -> None:
    index = DatasetIndex.load(shards)
    source = IndexedSource(
        index, plan=EpochPlan(16, 4), rank=0, world_size=1, batch_size=4, num_readers=1
    )
    batches = source.batches(LoaderState(0, 0, 0, index.digest))
    next(batches)
    for path in shards:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(b"\1" * size if keeps_size else b"\1" * (size + 512))
    with pytest.raises(DataError, match=r"part-00\d\.tar was replaced during the run.*index"):
        list(islice(batches, 8))
    source.close()
