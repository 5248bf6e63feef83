from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from support.shard_data import jpeg, shard, write_tar

from cmae.pipeline.formats.shard_index import build_index
from cmae.pipeline.formats.tar import TarError, TarMember, iter_records, iter_tar


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
        b"": "an empty file",
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


def test_an_index_counts_every_entry_and_says_why_it_is_left_out(tmp_path: Path) -> None:
    members = {"a.png": b"1", "b.png": b"2", "c.left.jpg": b"3", "._d.jpg": b"4", "e.txt": b"5"}
    found = build_index(write_tar(tmp_path / "a.tar", members)).members
    assert found.lost == {"png image": 2, "image with a dot in its name": 1}
    assert found.passed_over == {"hidden or side file": 1, "file without an image beside it": 1}
    assert found.examples["png image"] == "a.png"
    assert found.total == len(members)
    empty = build_index(write_tar(tmp_path / "empty.tar", {}))
    assert (len(empty), empty.members.total) == (0, 0)
