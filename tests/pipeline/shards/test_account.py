"""Whatever a tar holds, every entry of it has a line in the account, and a repair loses nothing silently."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.fault_data import noise, saved_as, truncated, zeroed_block
from support.pipeline_data import jpeg, photo
from support.shard_data import problem_lines, write_tar

from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.members.member_counts import MemberCounts
from cmae.pipeline.formats.shard_index import build_index, index_path, load_index, save_index
from cmae.pipeline.formats.tar import iter_records
from cmae.pipeline.shards.repair import REPAIRED_FILE, RepairPolicy, RepairReport, repair_shards
from cmae.pipeline.shards.verify import verify_shards

EXAMPLES = int(os.environ.get("CMAE_EXAMPLES", "60"))
"""Generated tars of each test; more, and others each time, by CMAE_EXAMPLES=2000."""

generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

GOOD = [noise(i, 40, 40) for i in range(3)] + [jpeg(photo(30, 40))]
IMAGES = [
    *GOOD,
    GOOD[0] + bytes(10000),
    saved_as("JPEG", progressive=True)(GOOD[1]),
    saved_as("PNG")(GOOD[2]),
    truncated(GOOD[0]),
    zeroed_block(noise(7)),
    b"",
    b"<html>",
]
LABELS = [b"0", b"3", b" 7\n", b"-1", b"-5", b"1_0", b"18446744073709551615", b"n01440764", b"3.0"]
LABELS += [b"\xef\xbb\xbf3", b"3\0", b"", b"9" * 5000]
JSONS = [b'{"label": 3}', b'{"label": "3"}', b'{"label": true}', b"{}", b"[" * 200000, b"[1]"]
JSONS += [b'{"label": 123456789012345678901234567890}', b'{"label": -1}', b'{"a": 1}']

STEMS = [
    "0",
    "1",
    "2",
    "3",
    "22.05_1",
    "4.left",
    "train/5",
    "./6",
    "__meta__",
    ".hidden",
    "ü",
    "7" * 120,
]
ODD = [
    "0009.",
    ".__key__",
    "0009._meta",
    "0.jpg/",
    "a//b.jpg",
    "0.CLS",
    "0.tar.gz",
    "readme",
    "1.bin",
]
SIDE = [
    ".DS_Store",
    "._0.jpg",
    "Thumbs.db",
    "@eaDir/0.jpg/S.jpg",
    "__MACOSX/._1.jpg",
    "desktop.ini",
]


class Data(bytes):
    """Bytes that a failing example shows by their length."""

    def __repr__(self) -> str:
        return super().__repr__() if len(self) < 30 else f"<{len(self)} bytes>"


class Item(NamedTuple):
    name: str
    data: bytes
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    sparse: bool = False


image_names = st.builds(
    "{}.{}".format, st.sampled_from(STEMS), st.sampled_from(["jpg", "JPEG", "jpe", "jfif", "png"])
)


def items_of(names: st.SearchStrategy[str], contents: list[bytes]) -> st.SearchStrategy[Item]:
    return st.builds(
        lambda name, data: Item(name, data), names, st.sampled_from(list(map(Data, contents)))
    )


images = items_of(image_names, IMAGES)
labels = st.one_of(
    items_of(st.sampled_from(STEMS).map("{}.cls".format), LABELS),
    items_of(st.sampled_from(STEMS).map("{}.json".format), JSONS),
)
others = items_of(st.sampled_from([*SIDE, *ODD, "0.txt", "2.avif"]), [b"some text"])
links = st.builds(
    lambda name, kind, target: Item(name, b"", kind, target),
    st.one_of(image_names, st.just("3.cls")),
    st.sampled_from([tarfile.LNKTYPE, tarfile.SYMTYPE]),
    st.sampled_from(["0.jpg", "1.jpg", "0.cls", "nowhere.jpg", "0.png"]),
)
odd = st.builds(
    lambda name, kind: Item(name, b"", kind),
    st.sampled_from(["folder/", "pipe.jpg", "x" * 2000 + ".jpg"]),
    st.sampled_from([tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]),
)
sparse = st.builds(lambda item: item._replace(sparse=True), images)
tars = st.lists(st.one_of(images, images, labels, labels, others, links, odd, sparse), max_size=14)


def make(path: Path, items: list[Item], tar_format: int) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.size, info.type, info.linkname = len(item.data), item.kind, item.target
            if item.sparse:
                info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
            tar.addfile(info, io.BytesIO(item.data))
    return path


def repaired(
    path: Path, out: Path, **policy: object
) -> tuple[RepairReport, list[dict[str, object]]]:
    report = repair_shards([path], out, RepairPolicy(**policy), workers=1)
    return report, [json.loads(line) for line in (out / REPAIRED_FILE).read_text().splitlines()]


def labels_of(path: Path) -> list[int]:
    return [] if not path.exists() else build_index(path).label.tolist()


def check_repair(path: Path, folder: Path) -> None:
    """Repair is listed, verified and idempotent, and loses no label that can be read."""
    try:
        report, lines = repaired(path, folder / "once")
    except ValueError:  # no record can be used
        return
    assert report.members.total >= 1 or not lines
    once = folder / "once" / path.name
    for problem in report.problems:  # what is left are labels that only their author can mend
        assert "label" in problem.what, problem_lines(verify_shards([once]))
    if not once.exists():
        return
    _, again = repaired(once, folder / "twice")
    assert {line["action"] for line in again} <= {"kept"}
    assert (folder / "twice" / path.name).read_bytes() == once.read_bytes()


@given(tars, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@example([Item("0.cls", b"-1"), Item("3.cls", b"", tarfile.LNKTYPE, "0.cls")], tarfile.GNU_FORMAT)
@generated
def test_every_entry_is_counted_once_by_every_tool(tmp_path_factory, items, tar_format):
    folder = tmp_path_factory.mktemp("account")
    if tar_format == tarfile.GNU_FORMAT:
        items = [item._replace(sparse=False) for item in items]
    path = make(folder / "a.tar", items, tar_format)
    index = build_index(path)
    assert index.members.total == len(items)
    assert index.members.counts.get("image", 0) == len(index)
    assert index.members.counts.get("label", 0) >= int((index.label != NO_LABEL).sum())
    save_index(index, index_path(path))
    assert load_index(path).members == index.members
    assert verify_shards([path]).members == index.members
    streamed = MemberCounts()
    with open(path, "rb") as file:
        num_records = len(list(iter_records(file, name="a", members=streamed)))
    assert (num_records, streamed) == (len(index), index.members)
    is_good = verify_shards([path]).ok
    check_repair(path, folder)
    if is_good and items:
        once = folder / "once" / "a.tar"
        if once.exists():  # else no image is in it
            assert once.read_bytes() == path.read_bytes()


@given(tars)
@generated
def test_repair_accounts_for_every_entry_and_loses_no_label(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("labels")
    path = make(folder / "a.tar", items, tarfile.PAX_FORMAT)
    try:
        report, lines = repaired(path, folder / "out")
    except ValueError:
        return
    assert report.members.total == len(items)
    kept = labels_of(folder / "out" / "a.tar")
    listed = json.dumps([line.get("label") for line in lines] + [line["reason"] for line in lines])
    for item in items:
        if item.name.endswith(".cls") and item.name[0] != "." and item.data.strip().isdigit():
            number = int(item.data) if len(item.data) < 4000 else None
            if number is not None and number < 2**63:
                assert (
                    number in kept or f"'{item.data.decode()}'" in listed or str(number) in listed
                )
    assert len(kept) == report.num_samples


@given(tars, st.data())
@generated
def test_a_damaged_tar_is_repaired_to_one_that_needs_no_repair(tmp_path_factory, items, data):
    folder = tmp_path_factory.mktemp("damage")
    path = make(folder / "a.tar", items, tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(1, 3000))
    filler = data.draw(st.sampled_from([bytes(length), b"\xa5" * length, b""]))
    path.write_bytes(whole[:start] + filler + whole[start + length :])
    report = verify_shards([path])
    assert all("cannot be checked" not in problem.what for problem in report.problems)
    check_repair(path, folder)


def test_the_images_that_no_sample_holds_are_named_with_the_repair(tmp_path: Path) -> None:
    png = saved_as("PNG")(GOOD[0])
    members = {
        "0.jpg": GOOD[0],
        "22.05_1.jpg": GOOD[1],
        "22.05_1.cls": b"4",
        "2.png": png,
        "3.jfif": GOOD[2],
    }
    path = write_tar(tmp_path / "a.tar", members)
    index = build_index(path)
    assert len(index) == 2
    assert index.members.lost == {
        "image with a dot in its name": 1,
        "png image": 1,
        "label with a dot in its name": 1,
    }
    text = problem_lines(verify_shards([path]))
    assert "1 x png image, such as 2.png" in text
    assert "--reencode" in text
    report, lines = repaired(path, tmp_path / "out", reencode=True)
    assert report.num_samples == 4
    assert dict(zip(*[iter_keys(tmp_path / "out" / "a.tar")][0], strict=True))["22_05_1"] == 4
    assert {line["action"] for line in lines} == {"renamed", "reencoded", "kept"}


def iter_keys(path: Path) -> tuple[list[str], list[int]]:
    index = build_index(path)
    return index.keys.tolist(), index.label.tolist()


def test_labels_that_lie_apart_are_joined_to_their_images(tmp_path: Path) -> None:
    members = {f"{i}.jpg": noise(i, 20, 20) for i in range(5)}
    members |= {f"{i}.txt": b"a caption" for i in range(5)}
    members |= {f"{i}.cls": str(i).encode() for i in range(5)}
    path = write_tar(tmp_path / "a.tar", members)
    report = verify_shards([path])
    text = problem_lines(report)
    assert (
        "5 x label without an image beside it, such as 0.cls with '0': sort the tar by name" in text
    )
    assert any(
        "no sample has a label that is read, though 5 are there" in one for one in report.notes
    )
    report, _ = repaired(path, tmp_path / "out")
    assert (report.num_joined, report.num_samples, report.problems) == (10, 5, ())
    assert labels_of(tmp_path / "out" / "a.tar") == [0, 1, 2, 3, 4]
    with tarfile.open(tmp_path / "out" / "a.tar") as tar:
        assert tar.getnames()[:3] == ["0.jpg", "0.txt", "0.cls"]
        assert {tar.extractfile(name).read() for name in tar.getnames() if name[2:] == "txt"} == {  # type: ignore[union-attr]
            b"a caption"
        }


def test_labels_are_told_apart_by_why_they_are_not_read(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    texts = {
        "unread": b"n01440764",
        "range": b"18446744073709551615",
        "good": b"3",
        "bool": b"true",
    }
    for number, (name, text) in enumerate(texts.items()):
        members |= {f"{name}.jpg": noise(number, 20, 20), f"{name}.cls": text}
    members["absent.jpg"] = noise(9, 20, 20)
    path = write_tar(tmp_path / "a.tar", members)
    lost = build_index(path).members
    assert lost.lost == {"label that cannot be read": 2, "label out of range": 1}
    assert lost.examples["label that cannot be read"] == "unread.cls with 'n01440764'"
    text = problem_lines(verify_shards([path]))
    assert "1 x label out of range, such as range.cls with '18446744073709551615'" in text
    assert "4 sample(s) have no integer label" in text
    report, lines = repaired(path, tmp_path / "out")
    assert (report.num_samples, report.num_suspect, report.num_dropped) == (5, 4, 0)
    assert any("unread.cls says 'n01440764'" in str(line["reason"]) for line in lines)


def test_a_suspected_image_is_kept_and_listed_unless_the_user_wants_it_gone(tmp_path: Path) -> None:
    suspect = zeroed_block(saved_as("JPEG", progressive=True)(noise(0, 300, 300)))
    path = write_tar(tmp_path / "a.tar", {"0.jpg": suspect, "1.jpg": GOOD[0] + bytes(10000)})
    save_index(build_index(path), index_path(path))
    report = verify_shards([path])
    assert report.ok
    assert [one.key for one in report.suspects] == ["0"]
    done, (line,) = repaired(path, tmp_path / "kept")
    assert (done.num_samples, line["action"]) == (2, "kept")
    assert (tmp_path / "kept" / "a.tar").read_bytes() == path.read_bytes()
    assert repaired(path, tmp_path / "dropped", drop_suspect=True)[0].num_samples == 1


def test_a_link_is_a_shard_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "shards").mkdir()
    middle = 70 * 1024
    members = {f"{i}.jpg": noise(i, 200, 200) for i in range(6)} | {"6.jpg": GOOD[0]}
    real = write_tar(tmp_path / "data" / "a.tar", members)
    link = tmp_path / "shards" / "a.tar"
    link.symlink_to("../data/a.tar")
    save_index(build_index(link), index_path(link))
    (tmp_path / "shards" / "classes.json").write_text('["one"]')
    whole = bytearray(real.read_bytes())
    assert middle > 64 * 1024
    whole[len(whole) // 2] ^= 4
    real.write_bytes(whole)
    _, lines = repaired(link, tmp_path / "out")
    assert ["CRC32" in str(line["reason"]) for line in lines] == [True]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["one"]


def test_links_inside_a_tar_get_a_copy_of_what_they_point_to(tmp_path: Path) -> None:
    items = [
        Item("0.jpg", GOOD[0]),
        Item("1.jpg", b"", tarfile.LNKTYPE, "0.jpg"),
        Item("2.jpg", b"", tarfile.SYMTYPE, "3.jpg"),
        Item("3.jpg", GOOD[1]),
        Item("4.jpg", b"", tarfile.SYMTYPE, "gone.jpg"),
    ]
    path = make(tmp_path / "a.tar", items, tarfile.GNU_FORMAT)
    assert build_index(path).members.lost == {"hard link": 1, "symbolic link": 2}
    report, lines = repaired(path, tmp_path / "out")
    assert (report.num_samples, report.problems) == (4, ())
    with open(tmp_path / "out" / "a.tar", "rb") as file:
        found = {one.key: one.image for one in iter_records(file, name="out")}
    assert found == {"0": GOOD[0], "1": GOOD[0], "2": GOOD[1], "3": GOOD[1]}
    assert [(line["member"], line["action"]) for line in lines] == [("4.jpg", "dropped")]
