from __future__ import annotations

import gzip
import io
import os
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
import webdataset as wds
from support.shard_data import jpeg, shard, write_tar

from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.formats.shard_index import build_index
from cmae.pipeline.formats.tar import TarError, TarMember, iter_records, iter_tar
from cmae.pipeline.shards.verify import verify_shards


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


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with a right checksum, whatever its size field holds."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124:136] = size.ljust(12, b"\0")[:12]
    block[156:157] = kind
    block[257:263] = b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(line: bytes) -> bytes:
    body = line.ljust(-(-len(line) // 512) * 512, b"\0")
    return header("pax", b"%011o" % len(line), b"x") + body


HOSTILE = {
    "a size of 2**45": header("0.jpg", b"\x80" + (1 << 45).to_bytes(11)),
    "a size of 2**80": header("0.jpg", b"\x80" + (1 << 80).to_bytes(11)),
    "a negative size": header("0.jpg", b"\xff" * 12),
    "a pax size of 4000 digits": pax(b"4010 size=" + b"9" * 4000) + header("0.jpg", b"0"),
    "a pax size with an underscore": pax(b"12 size=1_0\n") + header("0.jpg", b"0"),
    "a pax header of 2**40 bytes": header("pax", b"\x80" + (1 << 40).to_bytes(11), b"x"),
    "a long name of 2**40 bytes": header("long", b"\x80" + (1 << 40).to_bytes(11), b"L"),
    "a sparse map without an end": header("0.jpg", b"0", b"S")[:482] + b"\1" + bytes(29),
    "a size with a space": header("0.jpg", b"1 0"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_a_damaged_tar_and_costs_no_memory(tmp_path: Path, what: str) -> None:
    bad, good = tmp_path / "bad.tar", shard(tmp_path / "good.tar", 3)
    bad.write_bytes(HOSTILE[what] + bytes(2048))
    tracemalloc.start()
    try:
        with pytest.raises(TarError):
            build_index(bad)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    results = build_indices([str(bad), str(good)])
    assert [one.error is None for one in results] == [False, True]
    assert not verify_shards([bad]).ok


LABELS = {
    b"18446744073709551615": "label out of range",
    b"-5": "label out of range",
    b"1_0": "label that cannot be read",
    b"9" * 100_000: "label out of range",
    "\u0663".encode(): "label that cannot be read",
    b"+3": "label that cannot be read",
}
JSON_LABELS = {
    b'{"label": ' + b"9" * 30 + b"}": "label out of range",
    b'{"label": ' + b"9" * 5000 + b"}": "label that cannot be read",
    b'{"label": true}': "label that cannot be read",
    b'{"label": 3.0}': "label that cannot be read",
    b"[" * 200_000: "label that cannot be read",
    b'{"label": NaN}': "label that cannot be read",
}


@pytest.mark.parametrize(
    ("extension", "text", "fate"),
    [("cls", *item) for item in LABELS.items()] + [("json", *item) for item in JSON_LABELS.items()],
)
def test_a_label_that_is_no_class_number_is_none_and_is_counted(
    tmp_path: Path, extension: str, text: bytes, fate: str
) -> None:
    path = write_tar(tmp_path / "a.tar", {f"0.{extension}": text, "0.jpg": jpeg(0)})
    index = build_index(path)
    assert index.label.tolist() == [-1]
    assert index.members.lost == {fate: 1}
    assert verify_shards([path]).members == index.members


def test_members_that_nobody_reads_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    size = 3 << 30
    with open(path, "wb") as file:
        file.write(header("big.bin", b"%011o" % size))
        file.seek(size, os.SEEK_CUR)
        file.write(shard(tmp_path / "b.tar", 2).read_bytes())
    tracemalloc.start()
    try:
        start = time.perf_counter()
        assert len(build_index(path)) == 2
        assert time.perf_counter() - start < 2  # 3 GiB are passed over, not read
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_pax_is_refused_whatever_its_version(tmp_path: Path) -> None:
    for keyword in (
        "GNU.sparse.major=1",
        "GNU.sparse.size=9",
        "GNU.sparse.map=0,1",
        "SCHILY.filetype=sparse",
    ):
        body = f" {keyword}\n".encode()
        line = str(len(body) + 2).encode() + body
        payload = jpeg(0)
        member = header("0.jpg", b"%011o" % len(payload)) + payload + bytes(-len(payload) % 512)
        path = tmp_path / "a.tar"
        path.write_bytes(pax(line) + member + bytes(1024))
        index = build_index(path)
        assert (len(index), index.members.lost) == (0, {"sparse file": 1})


def test_a_key_cannot_forge_a_line_of_output(tmp_path: Path) -> None:
    name = "x\n\x1b[2Jno problem in 5 samples.png"
    index = build_index(write_tar(tmp_path / "a.tar", {name: b"1"}))
    (line,) = index.members.lost_lines()
    assert line.isprintable()
    assert "\\n\\x1b[2J" in line
