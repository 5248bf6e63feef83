from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.fault_data import (
    HARMLESS,
    SEEN_BY_THE_HEADER_WALK,
    noise,
    saved_as,
    without_huffman_table,
    zeroed_block,
)
from support.pipeline_data import jpeg, photo
from support.shard_data import problem_lines, write_tar

from cmae.pipeline.formats.shard_index import build_index, index_path, load_index, save_index
from cmae.pipeline.formats.tar import iter_records, iter_tar
from cmae.pipeline.shards.recover import Damage, salvage_tar
from cmae.pipeline.shards.repair import (
    REPAIRED_FILE,
    RepairPolicy,
    RepairReport,
    reencode_as_jpeg,
    repair_shards,
)
from cmae.pipeline.shards.verify import verify_shards

NUM = 20


def record(number: int, image: bytes | None = None) -> dict[str, bytes]:
    data = noise(number, 30, 40) if image is None else image
    return {f"{number:04d}.jpg": data, f"{number:04d}.cls": str(number % 4).encode()}


def shard(path: Path, faults: Mapping[int, bytes] | None = None, *, first: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    members: dict[str, bytes] = {}
    for number in range(first, first + NUM):
        members |= record(number, (faults or {}).get(number))
    return write_tar(path, members)


def indexed(path: Path) -> Path:
    save_index(build_index(path), index_path(path))
    return path


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    with open(path, "rb") as file:
        return {r.key: (r.image, r.label) for r in iter_records(file, name="x")}


def repair(shards: list[Path], out: Path, **policy) -> tuple[RepairReport, list[dict]]:
    """Repair, check that nothing is left to find, and return the report and the list of changes."""
    report = repair_shards(shards, out, RepairPolicy(**policy), workers=2)
    after = verify_shards(sorted(out.glob("*.tar")), decode=policy.get("decode", "none"))
    assert after.ok, problem_lines(after)
    assert after.num_samples == report.num_samples
    assert json.loads((out / "dataset.json").read_text())["complete"]
    lines = (out / REPAIRED_FILE).read_text().splitlines()
    return report, [json.loads(line) for line in lines]


def test_clean_shards_come_out_as_they_were(tmp_path):
    path = indexed(shard(tmp_path / "in" / "a.tar"))
    report, lines = repair([path], tmp_path / "out")
    assert report[:8] == (1, NUM, 0, 0, 0, 0, 0, 0)
    assert report.members.counts == {"copied": 2 * NUM}
    assert lines == []
    assert (tmp_path / "out" / "a.tar").read_bytes() == path.read_bytes()


def test_every_unusable_file_is_dropped_and_listed_and_the_rest_keeps_its_bytes(tmp_path):
    makers = [make for make, _ in SEEN_BY_THE_HEADER_WALK.values()] + [zeroed_block]
    faults = {i: make(noise(i)) for i, make in enumerate(makers)}
    faults |= {12 + i: make(noise(i)) for i, make in enumerate(HARMLESS.values())}
    path = shard(tmp_path / "in" / "a.tar", faults)
    report, lines = repair([path], tmp_path / "out")
    bad = {f"{i:04d}" for i in range(len(makers))}
    assert {line["key"] for line in lines} == bad
    assert {line["action"] for line in lines} == {"dropped"}
    assert all(line["reason"] for line in lines)
    before = contents(path)
    assert contents(tmp_path / "out" / "a.tar") == {k: v for k, v in before.items() if k not in bad}
    assert report.num_dropped == len(makers)


def test_what_only_a_decoder_refuses_is_dropped_when_asked(tmp_path):
    path = shard(tmp_path / "in" / "a.tar", {5: without_huffman_table(noise(5))})
    assert repair([path], tmp_path / "a")[0].num_dropped == 0
    assert repair([path], tmp_path / "b", decode="pil")[1][0]["key"] == "0005"


def test_bits_that_changed_since_the_index_was_made_are_found_even_when_it_is_stale(tmp_path):
    path = indexed(shard(tmp_path / "in" / "a.tar"))
    row = load_index(path)
    whole = bytearray(path.read_bytes())
    whole[int(row.byte_offset[3]) + 700] ^= 4  # near the start: the digest changes too
    path.write_bytes(whole)
    assert "index of the tar before it changed" in problem_lines(verify_shards([path]))
    _, (line,) = repair([path], tmp_path / "out")
    assert line["key"] == "0003"
    assert "CRC32" in line["reason"]


@pytest.mark.parametrize("harm", ["header", "zeros", "missing bytes", "cut", "front"])
def test_a_damaged_tar_loses_only_what_lies_in_the_damage(tmp_path, harm):
    path = indexed(shard(tmp_path / "in" / "a.tar"))
    index, before = load_index(path), contents(path)
    offset = int(index.byte_offset[7])
    whole = path.read_bytes()
    changed, lost = {
        "header": (whole[: offset - 400] + b"\xff" + whole[offset - 399 :], {"0007"}),
        "zeros": (whole[: offset - 512] + bytes(512) + whole[offset:], {"0007"}),
        "missing bytes": (whole[: offset + 900] + whole[offset + 2300 :], {"0007"}),
        "cut": (whole[: offset + 900], {f"{i:04d}" for i in range(7, NUM)}),
        "front": (whole[1100:], {"0000"}),
    }[harm]
    path.write_bytes(changed)
    report, lines = repair([path], tmp_path / "out")
    assert contents(tmp_path / "out" / "a.tar") == {
        key: value for key, value in before.items() if key not in lost
    }
    assert "damage" in {line["action"] for line in lines}
    assert report.num_damages >= 1


def test_a_label_that_was_lost_comes_back_from_the_index(tmp_path):
    path = indexed(shard(tmp_path / "in" / "a.tar"))
    before = contents(path)
    with tarfile.open(path) as tar:
        label_header = tar.getmember("0007.cls").offset
    whole = bytearray(path.read_bytes())
    whole[label_header : label_header + 512] = b"x" * 512
    path.write_bytes(whole)
    repair([path], tmp_path / "out")
    assert contents(tmp_path / "out" / "a.tar") == before


def test_without_an_index_a_record_whose_label_is_lost_is_dropped_or_kept(tmp_path):
    members = record(0) | record(1)
    del members["0001.cls"]
    path = write_tar(tmp_path / "a.tar", members)
    _, (line,) = repair([path], tmp_path / "drop", unlabelled="drop")
    assert (line["key"], line["action"]) == ("0001", "dropped")
    report = repair_shards([path], tmp_path / "keep")
    assert (report.num_samples, report.num_suspect) == (2, 1)
    assert "have no integer label" in report.problems[0].what
    del members["0000.cls"]  # where no record has one, none is missed
    path = write_tar(tmp_path / "a.tar", members)
    assert repair([path], tmp_path / "none")[0].num_samples == 2


def test_a_label_beyond_the_class_list_is_dropped(tmp_path):
    path = shard(tmp_path / "in" / "a.tar")
    (tmp_path / "in" / "classes.json").write_text('["a", "b", "c"]')
    report, _ = repair([path], tmp_path / "out", unlabelled="drop")
    assert report.num_dropped == NUM // 4
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a", "b", "c"]


def test_keys_become_unique_as_the_policy_says(tmp_path):
    one = shard(tmp_path / "in" / "a.tar")
    changed = {number: noise(500 + number, 30, 40) for number in range(0, NUM, 2)}
    two = shard(tmp_path / "in" / "b.tar", changed)  # half of it is the same again
    report, lines = repair([one, two], tmp_path / "rename")
    assert (report.num_renamed, report.num_dropped) == (NUM // 2, NUM // 2)
    assert {line["new_key"] for line in lines if line["action"] == "renamed"} == {
        f"{i:04d}_dup2" for i in range(0, NUM, 2)
    }
    assert contents(tmp_path / "rename" / "b.tar")["0002_dup2"][0] == changed[2]
    report, _ = repair([one, two], tmp_path / "drop", duplicates="drop")
    assert (report.num_samples, report.num_shards) == (NUM, 1)


def test_other_formats_become_jpegs_only_when_asked(tmp_path):
    picture = jpeg(photo(50, 60))
    faults = {3: saved_as("PNG")(picture), 4: saved_as("WEBP")(picture), 5: b"<html>"}
    members = {}
    for number in range(6):
        members |= record(number, faults.get(number))
    members |= {"0006.png": saved_as("PNG")(picture), "0006.cls": b"1"}
    path = write_tar(tmp_path / "a.tar", members)
    assert repair([path], tmp_path / "a")[0].num_samples == 3
    report, lines = repair([path], tmp_path / "b", reencode=True)
    assert (report.num_samples, report.num_reencoded, report.num_dropped) == (6, 3, 1)
    assert {line["key"] for line in lines if line["action"] == "reencoded"} == {
        "0003",
        "0004",
        "0006",
    }
    made, label = contents(tmp_path / "b" / "a.tar")["0003"]
    pixels = np.asarray(Image.open(io.BytesIO(made))).astype(int)
    expected = np.asarray(Image.open(io.BytesIO(picture))).astype(int)
    assert np.abs(pixels - expected).mean() < 2
    assert label == 3


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    made = np.asarray(Image.open(io.BytesIO(reencode_as_jpeg(file.getvalue()))))
    assert np.abs(made[..., 0].astype(int) - (ramp >> 8)).max() < 6


def test_stopped_and_run_again_it_writes_what_is_missing(tmp_path, monkeypatch):
    shards = [shard(tmp_path / "in" / f"{i}.tar", first=NUM * i) for i in range(4)]
    out = tmp_path / "out"
    written = []
    monkeypatch.setattr(
        "cmae.pipeline.shards.repair.build_index",
        lambda path: (
            written.append(path.name) or (build_index(path) if len(written) < 3 else 1 / 0)
        ),
    )
    with pytest.raises(ZeroDivisionError):
        repair_shards(shards, out, workers=1)
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.npz")}
    assert len(before) == 2
    (out / ".3.tar.1.partial").touch()
    repair(shards, out)
    assert not list(out.glob(".*.partial"))
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    with pytest.raises(ValueError, match=r"another source or settings \(reencode: False -> True\)"):
        repair_shards(shards, out, RepairPolicy(reencode=True))


def test_what_does_not_fit_is_refused(tmp_path):
    path = shard(tmp_path / "in" / "a.tar")
    other = shard(tmp_path / "other" / "a.tar")
    with pytest.raises(ValueError, match=r"occur twice, such as a\.tar"):
        repair_shards([path, other], tmp_path / "out")
    with pytest.raises(ValueError, match="is the folder of the shards"):
        repair_shards([path], tmp_path / "in")
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk" * 1000)
    with pytest.raises(ValueError, match="no record of the 1 shards can be used"):
        repair_shards([junk], tmp_path / "out")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_happens_to_a_tar_members_outside_the_harm_survive(tmp_path_factory, data):
    path = shard(tmp_path_factory.mktemp("tar") / "a.tar")
    whole = path.read_bytes()
    members = list(iter_tar(io.BytesIO(whole), name="x"))
    start = data.draw(st.integers(0, members[-1].byte_offset + len(members[-1].data) - 1))
    length = data.draw(st.integers(1, 5000))
    harm = data.draw(st.sampled_from(["overwrite", "zero", "remove", "cut"]))
    filler = {
        "overwrite": np.random.default_rng(start).bytes(length),
        "zero": bytes(length),
        "remove": b"",
        "cut": b"",
    }[harm]
    after = b"" if harm == "cut" else whole[start + length :]
    path.write_bytes(whole[:start] + filler + after)
    found = {item.name: item.data for item in salvage_tar(path) if not isinstance(item, Damage)}
    end = len(whole) if harm == "cut" else start + length
    for member in members:
        # With its padding: where the next header shows that bytes are gone, they may be the member's own.
        header, last = (
            member.byte_offset - 512,
            member.byte_offset + -(-len(member.data) // 512) * 512,
        )
        if last <= start or header >= end:
            assert found.get(member.name) == member.data, member.name


@pytest.mark.parametrize("place", range(8, 100, 13))
def test_a_nought_lost_from_a_header_does_not_cost_the_member_before_it(tmp_path, place):
    """Its checksum holds one byte earlier, in the padding of that member, whose bytes are all there."""
    path = shard(tmp_path / "a.tar")
    whole = path.read_bytes()
    members = list(iter_tar(io.BytesIO(whole), name="x"))
    before, broken, *after = members[2:]
    start = broken.byte_offset - 512 + len(broken.name) + place
    assert whole[start] == 0
    path.write_bytes(whole[:start] + whole[start + 1 :])
    found = {item.name: item.data for item in salvage_tar(path) if not isinstance(item, Damage)}
    for member in (*members[:2], before, *after):
        assert found.get(member.name) == member.data, member.name


def test_a_whole_tar_is_read_as_usual(tmp_path):
    path = shard(tmp_path / "a.tar")
    assert list(salvage_tar(path)) == list(iter_tar(io.BytesIO(path.read_bytes()), name="x"))


def test_an_image_too_long_for_a_jpeg_does_not_end_the_repair(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (65600, 2)).save(file, "PNG")
    path = write_tar(tmp_path / "a.tar", {"0.png": file.getvalue(), **record(1)})
    report, (line,) = repair([path], tmp_path / "out", reencode=True)
    assert (report.num_samples, line["key"], line["action"]) == (1, "0", "dropped")
