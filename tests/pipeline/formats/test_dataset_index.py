from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.shard_data import assert_equal, indexed_shard, jpeg, shard, write_tar

from cmae.pipeline.formats.dataset_index import DatasetIndex, build_indices
from cmae.pipeline.formats.images.jpeg import JpegKind
from cmae.pipeline.formats.shard_index import build_index, index_path, load_index, save_index


def test_a_bad_image_keeps_its_record_number_and_is_left_out_of_the_dataset(tmp_path: Path) -> None:
    members = {f"{i}.jpg": jpeg(i, (12, 10)) for i in range(4)}
    members["1.jpg"] = b"\x89PNG not a jpeg"
    members["2.jpg"] = members["2.jpg"][:-30]
    path = write_tar(tmp_path / "a.tar", members)
    index = build_index(path)
    assert index.keys.tolist() == ["0", "1", "2", "3"]
    assert index.valid.tolist() == [True, False, False, True]
    assert index.kind[1] == JpegKind.BAD
    assert index.height.tolist() == [10, 0, 0, 10]
    save_index(index, index_path(path))

    dataset = DatasetIndex.load([path])

    assert len(dataset) == 2
    assert dataset.num_bad == 2
    shards, record_numbers = dataset.locate([0, 1])
    assert shards.tolist() == [0, 0]
    assert record_numbers.tolist() == [0, 3]


def test_build_indices_reports_failures_and_keeps_fresh_indices(tmp_path: Path) -> None:
    good, fresh = shard(tmp_path / "a.tar"), indexed_shard(tmp_path / "b.tar")
    stale, bad = indexed_shard(tmp_path / "c.tar"), tmp_path / "d.tar"
    shard(stale, 9)
    bad.write_bytes(b"junk" * 500)
    steps: list[int] = []
    results = build_indices([str(p) for p in (good, fresh, stale, bad)], progress=steps.append)
    assert [result.built for result in results] == [True, False, True, False]
    assert [result.num_samples for result in results] == [5, 5, 9, 0]
    assert [result.error is None for result in results] == [True, True, True, False]
    assert "not a tar file" in str(results[3].error)
    assert sum(steps) == 4
    assert_equal(load_index(stale), build_index(stale))


def test_dataset_index_concatenates_and_locates(tmp_path: Path) -> None:
    paths = [indexed_shard(tmp_path / f"{i}.tar", n, seed=i) for i, n in enumerate((3, 1, 4))]
    dataset = DatasetIndex.load(paths)
    assert len(dataset) == 8
    assert dataset.shard_sizes.tolist() == [3, 1, 4]
    expected = [(s, p) for s, n in enumerate((3, 1, 4)) for p in range(n)]
    shards, record_numbers = dataset.locate(np.arange(8))
    assert list(zip(shards.tolist(), record_numbers.tolist(), strict=True)) == expected
    assert tuple(map(int, dataset.locate(5))) == (2, 1)
    ids = dataset.sample_id([0, 4, 7])
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 2 << 32, (2 << 32) + 3]
    assert dataset.key(2, 3) == "k2_3"
    for row, (number, record_number) in enumerate(expected):
        content = paths[number].read_bytes()
        start, size = dataset.byte_offset[row], dataset.size[row]
        assert content[start : start + size] == jpeg(
            number * 1000 + record_number, (12 + record_number, 10)
        )


def test_dataset_digest_follows_contents_and_order_not_paths(tmp_path: Path) -> None:
    a, b = (indexed_shard(tmp_path / f"{i}.tar", seed=i) for i in (0, 1))
    copy = indexed_shard(tmp_path / "copy_of_0.tar", seed=0)
    digest = DatasetIndex.load([a, b]).digest
    assert len(digest) == 16
    assert DatasetIndex.load([copy, b]).digest == digest
    assert DatasetIndex.load([b, a]).digest != digest
    assert DatasetIndex.load([a]).digest != digest


def test_a_dataset_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"no"})
    save_index(build_index(path), index_path(path))
    with pytest.raises(ValueError, match="none of the 1 records"):
        DatasetIndex.load([path])
    with pytest.raises(ValueError, match="empty"):
        DatasetIndex.load([])
