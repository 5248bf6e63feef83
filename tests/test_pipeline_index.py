from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from cmae.pipeline.index import (
    DatasetIndex,
    ShardIndex,
    StaleIndexError,
    TarError,
    TarMember,
    atomic_write,
    build_index,
    build_indices,
    index_path,
    iter_records,
    iter_tar,
    load_index,
    run_threads,
    save_index,
    tar_digest,
)
from cmae.pipeline.jpeg import JpegKind


def jpeg(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(
    path: Path, members: Mapping[str, bytes], *, tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, count: int = 5, *, seed: int = 0) -> Path:
    members: dict[str, bytes] = {}
    for i in range(count):
        members[f"k{seed}_{i}.cls"] = str(i % 3).encode()
        members[f"k{seed}_{i}.jpg"] = jpeg(seed * 1000 + i, (12 + i, 10))
    return write_tar(path, members)


def indexed_shard(path: Path, count: int = 5, *, seed: int = 0) -> Path:
    save_index(build_index(shard(path, count, seed=seed)), index_path(path))
    return path


def assert_equal(a: ShardIndex, b: ShardIndex) -> None:
    for name in ShardIndex.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
)
def test_every_column_describes_the_tar_in_every_format(tmp_path: Path, tar_format: int) -> None:
    long = "folder/" + "x" * 90 + "/" + "y" * (60 if tar_format == tarfile.USTAR_FORMAT else 200)
    names = ["a/one", long, "umlaut_ä", "last"]
    members: dict[str, bytes] = {}
    for i, name in enumerate(names):
        members[f"{name}.JPEG"] = jpeg(i, (20 + i, 30 + i))
        members[f"{name}.cls"] = str(i).encode()
    path = write_tar(tmp_path / "a.tar", members, tar_format=tar_format)

    index = build_index(path)

    assert index.keys.tolist() == names
    assert index.label.tolist() == [0, 1, 2, 3]
    assert index.width.tolist() == [20, 21, 22, 23]
    assert index.height.tolist() == [30, 31, 32, 33]
    assert index.valid.all()
    content = path.read_bytes()
    with tarfile.open(path) as tar:  # an independent reader
        for row, name in enumerate(names):
            info = tar.getmember(f"{name}.JPEG")
            assert index.offset[row] == info.offset_data
            assert index.size[row] == info.size
            payload = content[info.offset_data : info.offset_data + info.size]
            assert index.crc32[row] == zlib.crc32(payload) == zlib.crc32(members[info.name])


def test_grouping_is_that_of_webdataset(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "__meta__/skip.jpg": jpeg(0),
            "no_extension": b"x",
            "a.b/c.jpg": jpeg(1),
            "a.b/c.cls": b" 7\n",
            "c.jpeg": jpeg(2),
            "only_label.cls": b"1",
            "d.json": b'{"label": 3, "other": "x"}',
            "d.seg.png": b"mask",
            "d.JPG": jpeg(4),
            "e.left.jpg": jpeg(5),
        },
    )
    with tarfile.open(path, "a") as tar:
        tar.addfile(_typed("folder.jpg", tarfile.DIRTYPE))
        tar.addfile(_typed("link.jpg", tarfile.SYMTYPE, linkname="d.JPG"))
    with open(path, "rb") as file:
        ours = [(key, image, label) for key, _, image, label in iter_records(file, name="")]
    theirs = wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    with_image = {s["__key__"]: s.get("jpg", s.get("jpeg")) for s in theirs}
    with_image = {key: image for key, image in with_image.items() if image is not None}
    assert {key: image for key, image, _ in ours} == with_image
    assert [(key, label) for key, _, label in ours] == [("a.b/c", 7), ("c", -1), ("d", 3)]


def _typed(name: str, kind: bytes, *, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = linkname
    return info


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.cls", b"cat"), ("a.json", b"[1]"), ("a.json", b"{"), ("a.json", b'{"label": "x"}')],
)
def test_a_label_that_is_no_integer_counts_as_none(tmp_path: Path, name: str, data: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), name: data})
    assert build_index(path).label.tolist() == [-1]


def test_sizes_beyond_the_octal_field_are_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("big.jpg")
    header.size = 9 * 2**30
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(TarError, match=f"needs {9 * 2**30} bytes"):
        build_index(path)


def test_a_bad_image_keeps_its_position_and_is_left_out_of_the_dataset(tmp_path: Path) -> None:
    members = {f"{i}.jpg": jpeg(i) for i in range(4)}
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
    shards, positions = dataset.locate([0, 1])
    assert shards.tolist() == [0, 0]
    assert positions.tolist() == [0, 3]


def test_an_index_survives_its_file(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 7)
    index = build_index(path)
    save_index(index, index_path(path))
    assert index_path(path) == tmp_path / "a.index.npz"
    assert_equal(load_index(path), index)


def test_an_index_file_can_be_read_by_everyone(tmp_path: Path) -> None:
    path = indexed_shard(tmp_path / "a.tar")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(index_path(path).stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("change", ["grow", "shrink", "first byte", "last byte", "rewrite"])
def test_an_index_of_other_contents_is_refused(tmp_path: Path, change: str) -> None:
    path = indexed_shard(tmp_path / "a.tar", 40)
    content = bytearray(path.read_bytes())
    if change == "grow":
        content += bytes(512)
    elif change == "shrink":
        del content[-512:]
    elif change == "first byte":
        content[0] ^= 1
    elif change == "last byte":
        content[-1] ^= 1
    else:
        content = bytearray(shard(tmp_path / "b.tar", 40, seed=1).read_bytes()[: len(content)])
    path.write_bytes(content)
    with pytest.raises(StaleIndexError, match="cmae shards index"):
        load_index(path)


def test_a_touched_or_moved_shard_keeps_its_index(tmp_path: Path) -> None:
    path = indexed_shard(tmp_path / "a.tar")
    os.utime(path, (0, 0))
    assert len(load_index(path)) == 5
    (tmp_path / "moved").mkdir()
    for file in (path, index_path(path)):
        file.rename(tmp_path / "moved" / file.name)
    assert len(load_index(tmp_path / "moved" / "a.tar")) == 5


def test_a_change_in_the_middle_passes_the_digest_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(300_000))
    before = tar_digest(path)
    path.write_bytes(bytes(150_000) + b"x" + bytes(149_999))
    assert tar_digest(path) == before
    path.write_bytes(bytes(60_000) + b"x" + bytes(239_999))
    assert tar_digest(path) != before


@pytest.mark.parametrize("damage", [b"", b"PK junk", b"\x93NUMPY"])
def test_a_damaged_index_file_is_stale_not_a_crash(tmp_path: Path, damage: bytes) -> None:
    path = indexed_shard(tmp_path / "a.tar")
    index_path(path).write_bytes(damage)
    with pytest.raises(StaleIndexError, match="damaged or no index"):
        load_index(path)


def test_an_index_of_another_format_version_is_stale(tmp_path: Path) -> None:
    path = indexed_shard(tmp_path / "a.tar")
    with np.load(index_path(path)) as archive:
        columns = dict(archive)
    np.savez(index_path(path), **{**columns, "format_version": 99})
    with pytest.raises(StaleIndexError, match="format 99"):
        load_index(path)


def test_a_missing_index_names_the_command_that_makes_it(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match="cmae shards index"):
        load_index(path)
    with pytest.raises(FileNotFoundError, match=r"no\.tar"):
        load_index(tmp_path / "no.tar")


def test_damaged_tars_are_refused_with_the_byte(tmp_path: Path) -> None:
    good = shard(tmp_path / "good.tar", 10).read_bytes()
    with tarfile.open(tmp_path / "good.tar") as tar:
        third = tar.getmembers()[3]
        header, data = third.offset, third.offset_data
    bad = tmp_path / "bad.tar"
    cases = {
        good[: data + 100]: "truncated: .* needs",
        good[: header + 100]: "truncated: 100 bytes at byte",
        good[:header] + bytes(512) + good[header + 512 :]: f"zero block at byte {header}",
        good[:header] + b"\xff" + good[header + 1 :]: f"no tar header at byte {header}",
        gzip.compress(good): "compressed tar",
        b"hello": "not a tar file",
        b"hello" * 1000: "not a tar file",
        b"": "no files at all",
    }
    for content, message in cases.items():
        bad.write_bytes(content)
        with pytest.raises(TarError, match=message):
            build_index(bad)


def test_members_before_the_damage_are_still_yielded(tmp_path: Path) -> None:
    content = shard(tmp_path / "a.tar", 10).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        cut = tar.getmembers()[7].offset_data + 1
    members: list[TarMember] = []
    with pytest.raises(TarError):
        members.extend(iter_tar(io.BytesIO(content[:cut]), name="cut"))
    assert len(members) == 7


def test_a_malformed_pax_header_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", {"x" * 150 + ".jpg": jpeg(0)}, tar_format=tarfile.PAX_FORMAT
    )
    content = path.read_bytes()
    start = content.index(b" path=")
    for length in (b"000", b"abc"):
        path.write_bytes(content[: start - 3] + length + content[start:])
        with pytest.raises(TarError, match="pax header"):
            build_index(path)


def test_a_tar_without_images_says_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": b"1", "b.png": b"2", "c.left.jpg": b"3"})
    with pytest.raises(TarError, match=r"2 x png, 1 x left\.jpg"):
        build_index(path)


def test_an_atomic_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


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
    shards, positions = dataset.locate(np.arange(8))
    assert list(zip(shards.tolist(), positions.tolist(), strict=True)) == expected
    assert tuple(map(int, dataset.locate(5))) == (2, 1)
    ids = dataset.sample_index([0, 4, 7])
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 2 << 32, (2 << 32) + 3]
    assert dataset.key(2, 3) == "k2_3"
    for row, (number, position) in enumerate(expected):
        content = paths[number].read_bytes()
        start, size = dataset.offset[row], dataset.size[row]
        assert content[start : start + size] == jpeg(number * 1000 + position, (12 + position, 10))


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


def test_run_threads_keeps_order_and_drops_the_rest_after_an_error() -> None:
    assert run_threads(lambda x: x * x, range(50), workers=4) == [x * x for x in range(50)]
    done: list[int] = []
    stop = threading.Event()

    def work(x: int) -> None:
        if x == 2:
            raise KeyError(x)
        if x > 2:
            stop.wait(timeout=10)
        done.append(x)

    with pytest.raises(KeyError):
        run_threads(work, range(1000), workers=1, stop=stop)
    assert stop.is_set()
    assert len(done) <= 3


def test_real_shards_index_as_tarfile_reads_them(imagenet_sample: list[Path]) -> None:
    path = imagenet_sample[0]
    index = build_index(path)
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
    assert index.offset.tolist() == [member.offset_data for member in images]
    assert index.size.tolist() == [member.size for member in images]
    assert index.valid.all()
    assert (index.label >= 0).all()


def test_index_columns_have_the_documented_types(tmp_path: Path) -> None:
    index = load_index(indexed_shard(tmp_path / "a.tar"))
    types = {
        "offset": "int64",
        "size": "int64",
        "height": "int32",
        "width": "int32",
        "kind": "uint8",
        "orientation": "uint8",
        "crc32": "uint32",
        "label": "int64",
    }
    assert {name: str(getattr(index, name).dtype) for name in types} == types
    assert json.dumps(index.keys.tolist())
