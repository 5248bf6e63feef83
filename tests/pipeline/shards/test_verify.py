from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from support.shard_data import jpeg, problem_lines, tars

from cmae.pipeline.formats.images.jpeg import Decode
from cmae.pipeline.formats.shard_index import build_index, index_path, load_index, save_index
from cmae.pipeline.shards.originals.image_folder import read_image_list
from cmae.pipeline.shards.verify import verify_shards
from cmae.pipeline.shards.write import write_shards


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_flipped_bit_is_found_and_named(
    written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small shards lie within the digest's reach: look past it, as for the middle of a large one.
    index = load_index(written[1])
    overwrite(written[1], int(index.byte_offset[2]) + 900, b"\x55")
    monkeypatch.setattr(
        "cmae.pipeline.formats.shard_index.tar_digest", lambda path: index.tar_digest
    )
    report = verify_shards(written[1:2])
    assert [problem.key for problem in report.problems] == [index.keys[2]]
    assert "CRC32" in report.problems[0].what


def test_damaged_shards_are_found(written: list[Path]) -> None:
    index = load_index(written[0])
    overwrite(written[0], int(index.byte_offset[1]) + 700, b"\0" * 100)
    overwrite(written[1], int(load_index(written[1]).byte_offset[1]) - 512, b"\0" * 512)
    with open(written[2], "r+b") as file:
        file.truncate(int(load_index(written[2]).byte_offset[1]) + 10)
    index_path(written[3]).unlink()
    report = verify_shards(written)
    assert not report.ok
    text = problem_lines(report)
    assert "train-000000.index.npz was made for other contents" in text
    assert "train-000001.tar None: damaged: the tar ends with a zero block" in text
    assert "train-000002.tar None: truncated" in text
    assert "train-000003.tar None: " in text
    assert "has no index" in text
    assert "train-000004.tar" not in text


def test_a_tar_cut_between_members_is_found(written: list[Path]) -> None:
    index = load_index(written[0])
    end = int(index.byte_offset[-1] + -(-index.size[-1] // 512) * 512)
    with open(written[0], "r+b") as file:
        file.truncate(end)
    save_index(build_index(written[0]), index_path(written[0]))
    assert "no end marker" in problem_lines(verify_shards(written[:1]))


def test_an_index_that_lies_is_found(written: list[Path]) -> None:
    path = index_path(written[0])
    with np.load(path) as archive:
        columns = dict(archive)
    columns["width"] = columns["width"] + 1
    np.savez(path, **columns)
    report = verify_shards(written[:1])
    assert len(report.problems) == len(columns["width"])
    assert report.problems[0].what == "width is 40, the index says 41"


def test_duplicate_keys_are_found_across_shards(written: list[Path]) -> None:
    for path in (written[0], index_path(written[0])):
        shutil.copy(path, path.with_name(path.name.replace("000000", "000009")))
    report = verify_shards([*written, written[0].with_name("train-000009.tar")])
    count = len(load_index(written[0]))
    assert len(report.problems) == 1
    assert f"{count} key(s) occur also in train-000000.tar" in report.problems[0].what


def test_missing_labels_are_a_problem_only_where_others_have_one(tmp_path: Path) -> None:
    for name, labels in (("some", [0, -1]), ("none", [-1, -1])):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for i, label in enumerate(labels):
            (folder / f"{i}.jpg").write_bytes(jpeg(i))
            lines.append(f"{i}.jpg\t{label}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        source = read_image_list(tmp_path / f"{name}.txt", root=folder)
        write_shards(source, tmp_path / "out" / name)
    some, none = (verify_shards(tars(tmp_path / "out" / name)) for name in ("some", "none"))
    assert "1 sample(s) have no integer label" in problem_lines(some)
    assert none.ok
    assert "no sample has a label" in none.notes[0]


def test_a_label_beyond_the_class_list_is_found(written: list[Path]) -> None:
    (written[0].parent / "classes.json").write_text('["ant", "bee"]')
    assert "beyond the 2 names" in problem_lines(verify_shards(written))


@pytest.mark.parametrize("decode", ["pil", "nvimgcodec"])
def test_decoding_finds_what_a_header_hides(tmp_path: Path, decode: Decode) -> None:
    good = jpeg(0)
    scan = good.index(b"\xff\xda")
    no_tables = good.replace(b"\xff\xdb", b"\xff\xfe")  # quantisation tables become comments
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for key, data in {
            "good": good,
            "broken": no_tables,
            "short": good[:scan] + good[-2:],
        }.items():
            tar.write({"__key__": key, "jpg": data, "cls": 0})
    path = tmp_path / "a.tar"
    save_index(build_index(path), index_path(path))
    assert verify_shards([path]).ok
    keys = {problem.key for problem in verify_shards([path], decode=decode).problems}
    assert keys == {"broken", "short"}


def test_bad_images_in_a_foreign_shard_are_named_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with wds.TarWriter(str(path)) as tar:
        tar.write({"__key__": "fine", "jpg": jpeg(0), "cls": 0})
        tar.write({"__key__": "cut", "jpg": jpeg(1)[:-5], "cls": 0})
    save_index(build_index(path), index_path(path))
    report = verify_shards([path])
    assert [(problem.key, problem.what[:9]) for problem in report.problems] == [
        ("cut", "truncated")
    ]
