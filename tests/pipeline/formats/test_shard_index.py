from __future__ import annotations

import json
import os
import stat
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from support.shard_data import assert_equal, indexed_shard, jpeg, shard, write_tar

from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.shard_index import (
    StaleIndexError,
    build_index,
    index_path,
    load_index,
    save_index,
    tar_digest,
)


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
            assert index.byte_offset[row] == info.offset_data
            assert index.size[row] == info.size
            payload = content[info.offset_data : info.offset_data + info.size]
            assert index.crc32[row] == zlib.crc32(payload) == zlib.crc32(members[info.name])


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


def test_an_atomic_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_real_shards_index_as_tarfile_reads_them(imagenet_sample: list[Path]) -> None:
    path = imagenet_sample[0]
    index = build_index(path)
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
    assert index.byte_offset.tolist() == [member.offset_data for member in images]
    assert index.size.tolist() == [member.size for member in images]
    assert index.valid.all()
    assert (index.label >= 0).all()


def test_index_columns_have_the_documented_types(tmp_path: Path) -> None:
    index = load_index(indexed_shard(tmp_path / "a.tar"))
    types = {
        "byte_offset": "int64",
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
