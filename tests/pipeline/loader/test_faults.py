"""The table in docs/bad-data.md, row by row: every fault has one defined outcome, on both backends."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.fault_data import (
    HARMLESS,
    SEEN_BY_THE_HEADER_WALK,
    bit_flip,
    noise,
    truncated,
    without_huffman_table,
    zeroed_block,
)
from support.loaders import loader_of
from support.pipeline_data import jpeg, toy_mask, write_tar

from cmae.pipeline import Loader, ViewConfig
from cmae.pipeline.bad_samples import (
    BEFORE_FIRST_EPOCH,
    MAX_BAD_RUN,
    BadLimit,
    BadSample,
    Health,
    NoGoodSamplesError,
    read_ledger,
)
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.formats.shard_index import StaleIndexError, build_index, index_path, save_index
from cmae.pipeline.shards.verify import verify_shards

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
NUM = 24
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "dali"])


def write(path: Path, faults: dict[int, bytes], *, first: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    samples = [(f"{first + i:04d}", faults.get(i, noise(i)), first + i) for i in range(NUM)]
    return write_tar(path, samples)


def index(*paths: Path) -> None:
    assert all(result.error is None for result in build_indices([str(path) for path in paths]))


def open_loader(shards: Path | list[Path], **options) -> Loader:
    settings = {"batch_size": 8, "global_batch_size": 8, "num_threads": 2, "max_bad_fraction": 0.5}
    return loader_of(shards, VIEWS, draw_mask=toy_mask, **(settings | options))


def read_epoch(loader: Loader, steps: int = NUM // 8) -> dict[int, torch.Tensor]:
    """Online views by sample id."""
    with loader:
        batches = list(islice(loader, steps))
    return {
        int(sample): batch.online[row]
        for batch in batches
        for row, sample in enumerate(batch.sample_id)
    }


def ledger_of(tmp_path: Path) -> list[BadSample]:
    return list(read_ledger(tmp_path / "bad.jsonl"))


# --- images that the header walk refuses -----------------------------------------------------------------


@BACKENDS
def test_in_a_stream_every_unusable_file_is_passed_over_and_listed_with_its_reason(
    tmp_path, backend
):
    places = dict(enumerate(SEEN_BY_THE_HEADER_WALK.values()))
    faults = {place: make(noise(place)) for place, (make, _) in places.items()}
    path = write(tmp_path / "a.tar", faults)
    good = NUM - len(faults)
    loader = open_loader(
        path,
        view_backend=backend,
        ledger=tmp_path / "bad.jsonl",
        batch_size=good,
        global_batch_size=good,
    )
    assert sorted(read_epoch(loader, 1)) == sorted(set(range(NUM)) - set(faults))
    lines = {line.record_number: line for line in ledger_of(tmp_path)}
    assert lines.keys() == faults.keys()
    for place, (_, reason) in places.items():
        line = lines[place]
        assert reason in line.reason
        assert (line.shard, line.key, line.epoch) == (str(path), f"{place:04d}", 0)


def test_with_an_index_they_are_in_no_epoch_and_listed_once(tmp_path):
    faults = {i: make(noise(i)) for i, (make, _) in enumerate(SEEN_BY_THE_HEADER_WALK.values())}
    path = write(tmp_path / "a.tar", faults)
    index(path)
    for _ in range(2):  # the second is a run that continues
        with open_loader(path, ledger=tmp_path / "bad.jsonl") as loader:
            assert loader.num_samples == NUM - len(faults)
            next(loader)
            assert loader.bad_samples == 0
    lines = ledger_of(tmp_path)
    assert [line.record_number for line in lines] == sorted(faults)
    assert {line.epoch for line in lines} == {BEFORE_FIRST_EPOCH}
    assert {line.key for line in lines} == {f"{i:04d}" for i in faults}
    assert all("left out by the index" in line.reason for line in lines)


@pytest.mark.parametrize("name", SEEN_BY_THE_HEADER_WALK)
def test_verify_finds_them_before(tmp_path, name):
    make, _ = SEEN_BY_THE_HEADER_WALK[name]
    path = write(tmp_path / "a.tar", {5: make(noise(5))})
    index(path)
    (problem,) = verify_shards([path]).problems
    assert problem.key == "0005"


# --- images that are unusual, and used -------------------------------------------------------------------


@BACKENDS
def test_unusual_images_are_used_like_all_others(tmp_path, backend):
    faults = {i: make(noise(i)) for i, make in enumerate(HARMLESS.values())}
    path = write(tmp_path / "a.tar", faults)
    for source in ("stream", "indexed"):
        loader = open_loader(
            path, view_backend=backend, ledger=tmp_path / "bad.jsonl", source=source
        )
        assert sorted(read_epoch(loader)) == list(range(NUM))
        index(path)
    assert not (tmp_path / "bad.jsonl").exists()
    report = verify_shards([path])
    assert report.ok
    notes = "\n".join(report.notes)
    for fact in ("1 grayscale", "1 CMYK", "1 image(s) with an EXIF turn", "1 image(s) with a side"):
        assert fact in notes


@BACKENDS
def test_grey_and_cmyk_images_keep_their_colours(tmp_path, backend):
    """A plain red picture: grey has equal channels, CMYK is red again."""
    red = Image.new("RGB", (48, 48), (200, 40, 40))
    pictures = [jpeg(red), jpeg(red.convert("L")), jpeg(red.convert("CMYK"))]
    path = write_tar(tmp_path / "a.tar", [(f"{i}", data, i) for i, data in enumerate(pictures)])
    loader = open_loader(path, view_backend=backend, batch_size=3, global_batch_size=3)
    rgb, grey, cmyk = (
        view.float().mean((0, 1)) for _, view in sorted(read_epoch(loader, 1).items())
    )
    assert torch.allclose(rgb, torch.tensor([200.0, 40.0, 40.0]), atol=3)
    assert torch.allclose(grey, grey.mean().expand(3), atol=1)
    assert torch.allclose(cmyk, rgb, atol=6)


# --- damage that only the CRC or a decoder sees ----------------------------------------------------------


def damage_in_place(path: Path, sample: int, fault) -> None:
    """Change one image of an indexed shard in a way that leaves the tar's size and ends as they are."""
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{sample:04d}.jpg")
        data = tar.extractfile(member).read()
    assert 65536 < member.offset_data < path.stat().st_size - 65536 - len(data)
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(fault(data).ljust(len(data), b"\0")[: len(data)])


@BACKENDS
@pytest.mark.parametrize("fault", [bit_flip, zeroed_block, truncated])
def test_with_an_index_later_damage_is_found_by_its_crc(tmp_path, fault, backend):
    path = write(tmp_path / "a.tar", {})
    index(path)
    damage_in_place(path, 11, fault)
    loader = open_loader(path, view_backend=backend, ledger=tmp_path / "bad.jsonl")
    assert sorted(read_epoch(loader)) == list(range(NUM))  # the slot keeps its id
    (line,) = ledger_of(tmp_path)
    assert (line.record_number, line.key, line.epoch) == (11, "0011", 0)
    assert "CRC32" in line.reason
    assert {problem.key for problem in verify_shards([path]).problems} == {"0011"}


@BACKENDS
@pytest.mark.parametrize("fault", [bit_flip, zeroed_block])
def test_in_a_stream_they_decode_silently(tmp_path, fault, backend):
    path = write(tmp_path / "a.tar", {11: fault(noise(11))})
    loader = open_loader(path, view_backend=backend, ledger=tmp_path / "bad.jsonl")
    assert sorted(read_epoch(loader)) == list(range(NUM))
    assert not (tmp_path / "bad.jsonl").exists()


def test_verify_sees_a_lost_block_without_a_crc_and_a_bit_flip_not(tmp_path):
    for fault, keys in ((zeroed_block, {"0011"}), (bit_flip, set())):
        path = write(tmp_path / fault.__name__ / "a.tar", {11: fault(noise(11))})
        index(path)
        assert {problem.key for problem in verify_shards([path]).problems} == keys


@BACKENDS
@pytest.mark.parametrize("source", ["indexed", "stream"])
def test_what_only_the_decoder_refuses_is_replaced_and_listed(tmp_path, backend, source):
    path = write(tmp_path / "a.tar", {11: without_huffman_table(noise(11))})
    index(path)
    loader = open_loader(path, view_backend=backend, source=source, ledger=tmp_path / "bad.jsonl")
    assert len(read_epoch(loader)) == NUM
    (line,) = ledger_of(tmp_path)
    assert (line.record_number, line.key) == (11, "0011")
    assert verify_shards([path]).ok
    assert [p.key for p in verify_shards([path], decode="pil").problems] == ["0011"]


# --- labels and keys -------------------------------------------------------------------------------------


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("source", ["indexed", "stream"])
def test_a_missing_label_is_minus_one_and_a_key_may_occur_twice(tmp_path, source):
    members = [("a.jpg", noise(0)), ("a.cls", b"7"), ("b.jpg", noise(1)), ("a.jpg", noise(2))]
    members += [("a.cls", b"9"), ("a.jpg", noise(3)), ("a.cls", b"x")]
    path = write_members(tmp_path / "a.tar", members)
    index(path)
    with open_loader(
        path, source=source, batch_size=4, global_batch_size=4, shuffle=False
    ) as loader:
        batch = next(loader)
    assert batch.sample_id.tolist() == [0, 1, 2, 3]
    assert batch.label.tolist() == [7, -1, 9, -1]
    text = "\n".join(problem.what for problem in verify_shards([path]).problems)
    assert "2 sample(s) have no integer label" in text
    assert "occur more than once, such as a" in text


# --- tars ------------------------------------------------------------------------------------------------


def bad_header(data: bytes, name: bytes) -> bytes:
    at = data.index(name)
    return data[: at + 120] + bytes([data[at + 120] ^ 1]) + data[at + 121 :]


def without_end_marker(data: bytes) -> bytes:
    end = len(data.rstrip(b"\0"))
    return data[: end + -end % 512]


@pytest.mark.parametrize(
    ("harm", "record_numbers", "reason"),
    [
        (lambda data: data[: data.index(b"0010.jpg") + 2000], range(10), "truncated"),
        (lambda data: bad_header(data, b"0010.jpg"), range(10), "no tar header"),
        (without_end_marker, range(NUM), None),
    ],
    ids=["truncated", "bad header", "no end marker"],
)
def test_a_damaged_tar(tmp_path, harm, record_numbers, reason):
    path = write(tmp_path / "a.tar", {})
    index(path)
    path.write_bytes(harm(path.read_bytes()))
    if reason == "no tar header":  # out of the digest's sight, and the index does without headers
        assert sorted(read_epoch(open_loader(path))) == list(range(NUM))
    else:
        with pytest.raises(StaleIndexError, match="cmae shards index"):
            open_loader(path)
    loader = open_loader(
        path, source="stream", ledger=tmp_path / "bad.jsonl", batch_size=2, global_batch_size=2
    )
    assert sorted(read_epoch(loader, len(record_numbers) // 2)) == list(record_numbers)
    report = verify_shards([path])
    text = "\n".join(problem.what for problem in report.problems)
    if reason is None:
        assert "no end marker" in text
        return
    with open_loader(
        path, source="stream", ledger=tmp_path / "bad.jsonl", batch_size=2, global_batch_size=2
    ) as loader:
        for _ in range(6):  # into the next epoch: the loss of the rest is noted by then
            next(loader)
    lines = [line for line in ledger_of(tmp_path) if line.epoch == 0]
    assert len(lines) == 1
    assert reason in lines[0].reason
    assert (lines[0].record_number, lines[0].key) == (10, "")
    assert reason in text
    assert "can be recovered (`cmae shards repair`)" in text
    recoverable = 10 if "truncated" in reason else NUM - 1
    assert f"; {recoverable} record(s)" in text


@BACKENDS
def test_a_shard_deleted_during_the_run_is_bad_samples_and_no_more(tmp_path, backend):
    paths = [write(tmp_path / "s" / f"{i}.tar", {}, first=NUM * i) for i in range(4)]
    index(*paths)
    # In order, so that what is read ahead does not open the last one before it goes.
    loader = open_loader(
        paths, view_backend=backend, ledger=tmp_path / "bad.jsonl", shuffle=False, num_readers=1
    )
    paths[3].unlink()
    seen = read_epoch(loader, 4 * NUM // 8)
    assert len(seen) == 4 * NUM
    lines = [line for line in ledger_of(tmp_path) if line.epoch == 0]
    assert len(lines) == NUM
    assert {line.shard for line in lines} == {str(paths[3])}
    assert all("the shard cannot be read: No such file" in line.reason for line in lines)
    assert {line.key for line in lines} == {f"{3 * NUM + i:04d}" for i in range(NUM)}
    assert "No such file" in verify_shards(paths).problems[0].what


def test_a_stream_goes_on_without_a_deleted_shard(tmp_path):
    paths = [write(tmp_path / "s" / f"{i}.tar", {}, first=NUM * i) for i in range(3)]
    loader = open_loader(
        paths, source="stream", ledger=tmp_path / "bad.jsonl", shuffle=False, prefetch=1
    )
    paths[2].unlink()
    with loader:
        for _ in range(8):
            next(loader)
    assert "No such file" in ledger_of(tmp_path)[0].reason


def test_an_index_of_another_tar_is_refused_with_the_command_that_repairs_it(tmp_path):
    one = write(tmp_path / "1.tar", {})
    two = write(tmp_path / "2.tar", {3: noise(99)}, first=100)
    index(one, two)
    index_path(two).write_bytes(index_path(one).read_bytes())
    with pytest.raises(StaleIndexError, match=r"2\.index\.npz .*cmae shards index"):
        open_loader([one, two])
    assert not verify_shards([two]).ok


# --- counting --------------------------------------------------------------------------------------------


def test_a_record_has_one_line_an_epoch_however_often_the_run_is_continued(tmp_path):
    path = write(tmp_path / "a.tar", {})
    index(path)
    damage_in_place(path, 11, bit_flip)
    ledger = tmp_path / "bad.jsonl"
    with open_loader(path, ledger=ledger) as loader:
        states = [None] + [next(loader).state for _ in range(7)]  # two epochs and a bit
    for state in states:
        with open_loader(path, ledger=ledger, state=state) as loader:
            for _ in range(3):
                next(loader)
    epochs = [line.epoch for line in ledger_of(tmp_path)]
    assert epochs == list(range(max(epochs) + 1))
    assert len(epochs) >= 3


def test_a_line_that_a_killed_run_left_unfinished_does_no_harm(tmp_path):
    ledger = tmp_path / "bad.jsonl"
    bad = BadSample("x.tar", "k", 3, "broken", 0)
    Health(ledger=ledger, limit=None, rank=2).add(8, [bad])
    assert json.loads(ledger.read_text())["rank"] == 2
    ledger.write_text(ledger.read_text() + '{"shard": "y.t')
    health = Health(ledger=ledger, limit=BadLimit(0.5))
    health.add(8, [bad])
    health.add(8, [BadSample("x.tar", "k", 4, "broken", 0)])
    assert health.bad_samples == 2
    assert [line.record_number for line in read_ledger(ledger)] == [3, 4]


def test_an_index_of_sizes_that_no_image_has_ends_the_run_at_a_named_limit(tmp_path):
    """All sizes are possible ones, so that only the decoder finds out: of every sample that it is given."""
    path = write(tmp_path / "a.tar", {})
    wrong = np.full(NUM, 9000, dtype=np.int32)
    save_index(replace(build_index(path), height=wrong, width=wrong), index_path(path))
    ledger = tmp_path / "bad.jsonl"
    with open_loader(path, ledger=ledger, view_backend="cpu") as loader:
        with pytest.raises(NoGoodSamplesError) as ended:
            next(loader)
        # So does every call that follows.
        with pytest.raises(NoGoodSamplesError):
            next(loader)
    message = str(ended.value)
    assert f"more than the limit of {MAX_BAD_RUN}" in message
    assert str(path) in message
    assert {line.shard for line in read_ledger(ledger)} == {str(path)}


def test_bad_samples_beside_good_ones_reach_no_limit_of_the_row(tmp_path):
    path = write(tmp_path / "a.tar", {i: without_huffman_table(noise(i)) for i in range(1, NUM, 2)})
    index(path)
    with open_loader(path, ledger=tmp_path / "bad.jsonl", view_backend="cpu") as loader:
        for _ in range(10 * NUM // 8):
            next(loader)
    assert loader.bad_samples > MAX_BAD_RUN


def test_damaged_lines_of_a_ledger_are_passed_over_and_counted(tmp_path, caplog):
    ledger = tmp_path / "bad.jsonl"
    good = [BadSample("x.tar", f"k{number}", number, "broken", 0) for number in range(4)]
    health = Health(ledger=ledger, limit=None)
    for one in good:
        health.add(8, [one])
    lines = ledger.read_bytes().splitlines(keepends=True)
    damage = [
        bytes(4096) + b"\n",
        b"\xff\xfe{\n",
        b"[" * 100_000 + b"\n",
        b"7\n",
        b'{"shard": 1, "key": "k", "reason": "", "record_number": 1, "epoch": 0}\n',
        b"x" * (3 << 20) + b"\n",
    ]
    ledger.write_bytes(lines[0] + b"".join(damage) + b"".join(lines[1:]))
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert list(read_ledger(ledger)) == good
    (warning,) = caplog.messages
    assert "passed over 6 line(s) that are no records, the first is line 2" in warning
    Health(ledger=ledger, limit=None).add(8, good)  # all of them are known
    assert list(read_ledger(ledger)) == good


def test_a_ledger_that_cannot_be_written_ends_nothing_and_loses_nothing(tmp_path, caplog):
    ledger = tmp_path / "folder" / "bad.jsonl"
    ledger.parent.write_text("in the way")
    bad = [BadSample("x.tar", "k", number, "broken", 0) for number in range(3)]
    health = Health(ledger=ledger, limit=None)
    with caplog.at_level("WARNING"):
        health.add(8, bad[:1])
        health.add(8, bad[1:2])
    assert sum("cannot be written" in message for message in caplog.messages) == 1
    ledger.parent.unlink()
    health.add(8, bad[2:])
    assert list(read_ledger(ledger)) == bad


def test_a_disk_that_takes_half_of_a_line_gets_it_whole_later(tmp_path, monkeypatch):
    ledger = tmp_path / "bad.jsonl"
    bad = [BadSample("x.tar", "k", number, "broken", 0) for number in range(3)]
    health = Health(ledger=ledger, limit=None)
    real, rooms = os.write, [130]

    def write(handle, data):
        if rooms and rooms[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(handle, data[: rooms[0]] if rooms else data)
        if rooms:
            rooms[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    health.add(8, bad[:2])
    assert 0 < ledger.stat().st_size <= 130
    rooms.clear()
    health.add(8, bad[2:])
    assert list(read_ledger(ledger)) == bad


def test_the_padded_end_of_an_epoch_counts_no_record_twice(tmp_path):
    path = write(tmp_path / "a.tar", {})
    index(path)
    damage_in_place(path, 11, bit_flip)
    options = {"batch_size": 10, "global_batch_size": 10, "last_batch": "pad"}
    for seed in range(12):  # in some of them sample 11 is among the first, which pad
        with open_loader(path, seed=seed, **options) as loader:
            batches = [next(loader) for _ in range(3)]
            assert loader.bad_samples == 1
        ids = [int(i) for batch in batches for i in batch.sample_id]
        assert sorted(set(ids)) == list(range(NUM))
        assert ids[NUM:] == ids[: 30 - NUM]
        for first, again in zip(range(6), range(4, 10), strict=True):
            assert torch.equal(batches[0].online[first], batches[2].online[again])
