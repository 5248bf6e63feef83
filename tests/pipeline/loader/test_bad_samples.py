"""Injected faults: no bad record ends a run, every one is counted, and too many of them do end it."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipeline_data import jpeg, photo, toy_mask, write_tar

from cmae.pipeline import DataError, Loader, ViewConfig, build_loader
from cmae.pipeline.bad_samples import BadLimit, BadSample, Health
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.formats.shard_index import index_path, load_index

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
NUM = 40


def good(number: int) -> bytes:
    # Noise compresses badly: the middle of the shard is then far from the ends that the digest covers.
    rng = np.random.default_rng(number)
    return jpeg(rng.integers(0, 256, (110, 120, 3), dtype=np.uint8))


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png(data: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(40, 50)).save(file, "PNG")
    return file.getvalue()


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def without_huffman_table(data: bytes) -> bytes:
    """Header and end are in order; only a decoder finds out."""
    table = data.index(b"\xff\xc4")
    return data[: table + 5] + b"\xff" * 16 + data[table + 21 :]


def write(folder: Path, faults: dict[int, object]) -> Path:
    folder.mkdir(exist_ok=True)
    samples = [(f"{i:04d}", faults[i](good(i)) if i in faults else good(i), i) for i in range(NUM)]
    return write_tar(folder / "part-000.tar", samples)


def open_loader(folder: Path, **options) -> Loader:
    settings = {"batch_size": 8, "global_batch_size": 8, "num_threads": 2, "max_bad_fraction": 0.2}
    return build_loader(folder, VIEWS, draw_mask=toy_mask, **(settings | options))


def take(loader: Loader, count: int):
    with loader:
        return list(islice(loader, count)), loader.bad_samples


def read(ledger: Path) -> list[dict]:
    return [json.loads(line) for line in ledger.read_text().splitlines()]


@pytest.fixture
def flipped(tmp_path) -> tuple[Path, int]:
    """A shard in which one bit of one image changed after it was indexed, and that image's number."""
    path = write(tmp_path / "flipped", {})
    assert path.stat().st_size > 3 * 65536
    build_indices([str(path)])
    index = load_index(path)
    victim = int(np.searchsorted(index.byte_offset, path.stat().st_size // 2))
    byte = int(index.byte_offset[victim] + index.size[victim] // 2)
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)
    return path.parent, victim


@pytest.mark.parametrize("backend", ["host", "dali"])
@pytest.mark.parametrize("fault", [truncated, png, zeros, without_huffman_table])
def test_a_bad_image_in_a_stream_is_replaced_and_written_down(tmp_path, fault, backend):
    path = write(tmp_path / "shard", {5: fault, 19: fault})
    ledger = tmp_path / "run" / "bad.jsonl"
    batches, bad = take(open_loader(path.parent, ledger=ledger, backend=backend), 4)
    assert bad == 2
    lines = read(ledger)
    assert sorted(line["record_number"] for line in lines) == [5, 19]
    assert {line["shard"] for line in lines} == {str(path)}
    assert {line["epoch"] for line in lines} == {0}
    assert all(line["reason"] for line in lines)
    assert all(batch.online.shape == (8, 32, 32, 3) for batch in batches)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(truncated, "truncated"), (png, "found PNG"), (zeros, "zero bytes")],
)
def test_the_ledger_says_what_was_wrong(tmp_path, fault, reason):
    path = write(tmp_path / "shard", {7: fault})
    ledger = tmp_path / "bad.jsonl"
    take(open_loader(path.parent, ledger=ledger), 4)
    (line,) = read(ledger)
    assert reason in line["reason"]
    assert line["key"] == "0007"


def test_images_found_bad_by_the_index_never_reach_an_epoch(tmp_path):
    path = write(tmp_path / "shard", {3: truncated, 30: png})
    build_indices([str(path)])
    with open_loader(path.parent, batch_size=38, global_batch_size=38) as loader:
        assert loader.num_samples == NUM - 2
        assert sorted(next(loader).sample_id.tolist()) == sorted(set(range(NUM)) - {3, 30})
        assert loader.bad_samples == 0


def test_a_flipped_bit_is_found_by_its_crc(flipped, tmp_path):
    folder, victim = flipped
    ledger = tmp_path / "bad.jsonl"
    batches, bad = take(open_loader(folder, ledger=ledger), 5)
    assert bad == 1
    (line,) = read(ledger)
    assert "CRC32" in line["reason"]
    assert (line["record_number"], line["key"]) == (victim, f"{victim:04d}")
    # The slot keeps its id and is filled with the next image of the data set.
    ids = torch.cat([batch.sample_id for batch in batches])
    labels = torch.cat([batch.label for batch in batches])
    assert sorted(ids.tolist()) == list(range(NUM))
    assert labels[ids == victim].tolist() == [(victim + 1) % NUM]
    assert torch.equal(labels[ids != victim], ids[ids != victim])


def test_without_crc_a_flipped_bit_passes(flipped):
    folder, _ = flipped
    _, bad = take(open_loader(folder, check_crc=False), 5)
    assert bad == 0


@pytest.mark.parametrize("fault", ["crc", "decode"])
def test_the_substitute_is_the_same_on_any_number_of_ranks(flipped, tmp_path, fault):
    folder, victim = flipped
    if fault == "decode":
        victim = 11
        folder = write(tmp_path / "decode", {victim: without_huffman_table}).parent
        build_indices([str(folder / "part-000.tar")])

    def pixels(batches):
        return {
            int(i): (batch.online[row], batch.target[row], int(batch.label[row]))
            for batch in batches
            for row, i in enumerate(batch.sample_id)
        }

    alone, bad = take(open_loader(folder), 5)
    ranks = [
        take(open_loader(folder, batch_size=2, rank=rank, world_size=4), 5) for rank in range(4)
    ]
    one, many = pixels(alone), pixels([batch for rank, _ in ranks for batch in rank])
    assert bad == 1
    assert sum(count for _, count in ranks) == 1
    assert one.keys() == many.keys()
    for sample, (online, target, label) in one.items():
        assert torch.equal(online, many[sample][0])
        assert torch.equal(target, many[sample][1])
        assert label == many[sample][2]
    assert one[victim][2] == victim + 1


def test_neighbours_that_no_decoder_takes_are_replaced_by_the_next_good_one(tmp_path):
    faults = dict.fromkeys((11, 12, 13), without_huffman_table)
    path = write(tmp_path / "shard", faults)
    build_indices([str(path)])
    for backend in ("host", "dali"):
        batches, bad = take(open_loader(path.parent, backend=backend), 5)
        labels = {
            int(i): int(label)
            for batch in batches
            for i, label in zip(batch.sample_id, batch.label, strict=True)
        }
        assert [labels[i] for i in (11, 12, 13)] == [14, 14, 14]
        assert bad == 3


def test_too_many_bad_samples_end_the_run_and_name_the_ledger(tmp_path):
    path = write(tmp_path / "shard", dict.fromkeys(range(0, NUM, 4), png))
    ledger = tmp_path / "bad.jsonl"
    options = {"ledger": ledger, "max_bad_fraction": 0.1}
    with (
        open_loader(path.parent, probation=30, **options) as loader,
        pytest.raises(DataError, match=r"max_bad_fraction=0\.1.*bad\.jsonl"),
    ):
        list(islice(loader, 50))
    with open_loader(path.parent, probation=10_000, **options) as loader:
        list(islice(loader, 20))


def test_a_shard_cut_short_gives_what_is_left_in_it(tmp_path):
    path = write(tmp_path / "shard", {})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ledger = tmp_path / "bad.jsonl"
    batches, bad = take(open_loader(path.parent, ledger=ledger, shuffle=False), 3)
    assert [int(i) for batch in batches for i in batch.sample_id] == [*range(16), *range(8)]
    assert bad >= 1
    assert "truncated" in read(ledger)[0]["reason"]


def test_a_shard_of_nothing_but_bad_images_is_an_error_not_a_hang(tmp_path):
    path = write(tmp_path / "shard", dict.fromkeys(range(NUM), zeros))
    with (
        open_loader(path.parent, max_bad_fraction=1.0) as loader,
        pytest.raises(DataError, match="fewer than batch_size=8"),
    ):
        next(loader)


def test_a_stale_index_is_refused(tmp_path):
    path = write(tmp_path / "shard", {})
    build_indices([str(path)])
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=index_path(path).name):
        open_loader(path.parent)


def test_rate_is_looked_at_only_after_the_probation():
    health = Health(ledger=None, limit=BadLimit(0.01, probation=100))
    bad = BadSample("x.tar", "k", 0, "broken", 0)
    health.add(99)
    for _ in range(5):
        health.add(0, [bad])
    health.add(1)
    with pytest.raises(DataError, match="6 of 100"):
        health.add(0, [bad])
    assert health.bad_samples == 6


def test_rate_below_the_limit_is_no_error():
    health = Health(ledger=None, limit=BadLimit(0.01, probation=100))
    health.add(1000)
    for _ in range(10):
        health.add(0, [BadSample("x.tar", "k", 0, "broken", 0)])
    with pytest.raises(DataError):
        health.add(0, [BadSample("x.tar", "k", 0, "broken", 0)])
