from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from cmae.pipeline import shards as shards_module
from cmae.pipeline.index import build_index, index_path, iter_records, load_index, save_index
from cmae.pipeline.shards import (
    Decode,
    ImageSource,
    VerifyReport,
    WriteReport,
    contact_sheet,
    read_image_list,
    scan_image_folder,
    shard_statistics,
    verify_shards,
    write_shards,
)

NUM_IMAGES = 24


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 JPEGs in three classes; one class has a subfolder."""
    root = tmp_path / "images"
    for i in range(NUM_IMAGES):
        folder = root / ["cat", "ant/deep", "bee"][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.{['jpg', 'JPEG'][i % 2]}").write_bytes(jpeg(i))
    return root


def write(root: Path, out: Path, *, samples_per_shard: int = 5, seed: int = 0) -> WriteReport:
    return write_shards(
        scan_image_folder(root), out, samples_per_shard=samples_per_shard, seed=seed
    )


def tars(out: Path) -> list[Path]:
    return sorted(out.glob("*.tar"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def read_with_webdataset(out: Path) -> dict[str, tuple[bytes, int]]:
    dataset = wds.WebDataset([str(path) for path in tars(out)], shardshuffle=False)
    return {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in dataset}


def problem_lines(report: VerifyReport) -> str:
    return "\n".join(f"{Path(p.shard).name} {p.key}: {p.what}" for p in report.problems)


# --- sources --------------------------------------------------------------------------------------


def test_classes_are_numbered_as_imagefolder_numbers_them(images: Path) -> None:
    from torchvision.datasets import ImageFolder

    source, reference = scan_image_folder(images), ImageFolder(str(images))
    assert list(source.classes) == reference.classes == ["ant", "bee", "cat"]
    assert [(image.path, image.label) for image in source.images] == reference.samples


def test_hidden_and_foreign_files_are_passed_over(images: Path) -> None:
    (images / ".cache").mkdir()
    (images / ".cache" / "x.jpg").touch()
    (images / "bee" / "readme.txt").touch()
    (images / "loose.jpg").touch()
    source = scan_image_folder(images)
    assert len(source.images) == NUM_IMAGES
    assert source.classes == ("ant", "bee", "cat")
    assert source.num_ignored == 1


def test_a_flat_folder_is_a_set_without_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    source = scan_image_folder(tmp_path)
    assert source.classes == ()
    assert [image.label for image in source.images] == [-1, -1, -1]


def test_wrong_folders_are_explained(tmp_path: Path, images: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ValueError, match="images=") as caught:
            scan_image_folder(folder)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "no" / "where")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in message(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    assert "found 1 .txt" in message(tmp_path / "text")
    assert "is a file" in message(tmp_path / "text" / "a.txt")
    (tmp_path / "png" / "a").mkdir(parents=True)
    (tmp_path / "png" / "a" / "a.png").touch()
    assert "convert" in message(tmp_path / "png")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    assert "cmae shards index" in message(tmp_path / "tars")
    shutil.copytree(images, tmp_path / "imagenet" / "train")
    assert str(tmp_path / "imagenet" / "train") in message(tmp_path / "imagenet")
    (images / "dog").mkdir()
    assert "1 of 4 class folders hold no image, for example dog" in message(images)


def test_an_image_list_gives_paths_and_labels(images: Path, tmp_path: Path) -> None:
    (images / "bee" / "with space.jpg").write_bytes(jpeg(99))
    listed = tmp_path / "list.txt"
    listed.write_text(f"bee/002.jpg 7\n\nbee/with space.jpg\t0\n{images}/cat/000.jpg\t-1\n")
    source = read_image_list(listed, root=images)
    assert [(image.key, image.label) for image in source.images] == [
        ("bee/002", 7),
        ("bee/with space", 0),
        ("cat/000", -1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bee/002.jpg cat\n", "line 1: 'bee/002.jpg cat' is not"),
        ("bee/002.jpg 1\nbee/005.JPEG\n", "line 2"),
        ("bee/002.jpg -2\n", "line 1"),
        ("bee/002.jpg 1\nbee/none.jpg 1\n", r"1 of 2 files are missing.*bee/none\.jpg"),
        ("\n", "0 of 0"),
    ],
)
def test_a_faulty_image_list_names_the_line_or_file(
    images: Path, tmp_path: Path, text: str, message: str
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_image_list(listed, root=images)


def test_keys_are_unique_and_survive_webdataset(tmp_path: Path) -> None:
    names = ["a.b.jpg", "a_b.jpg", "a_b.jpeg", "__x__.jpg", "ümläut é.jpg", "l" * 200 + ".jpg"]
    root = tmp_path / "images"
    for folder in ("__odd__", "v1.0"):
        (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            (root / folder / name).write_bytes(jpeg(i))
    write(root, tmp_path / "out")
    samples = read_with_webdataset(tmp_path / "out")
    assert len(samples) == 12
    assert {image for image, _ in samples.values()} == {jpeg(i) for i in range(6)}
    assert "v1.0/a_b" in samples
    assert verify_shards(tars(tmp_path / "out")).ok


# --- writing --------------------------------------------------------------------------------------


def test_webdataset_reads_back_every_byte_and_label(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    report = write(images, out)
    assert report == WriteReport(5, 0, NUM_IMAGES, 0, sum(p.stat().st_size for p in tars(out)))
    assert [path.name for path in tars(out)] == [f"train-{i:06d}.tar" for i in range(5)]
    classes = json.loads((out / "classes.json").read_text())
    expected = {
        str(path.relative_to(images).with_suffix("")): (
            path.read_bytes(),
            classes.index(path.relative_to(images).parts[0]),
        )
        for path in images.rglob("*.*")
    }
    assert read_with_webdataset(out) == expected
    assert verify_shards(tars(out), decode="pil") == VerifyReport(
        5, NUM_IMAGES, report.num_bytes, problems=(), notes=()
    )


def test_the_index_written_along_is_the_one_built_afterwards(images: Path, tmp_path: Path) -> None:
    write(images, tmp_path / "out")
    for path in tars(tmp_path / "out"):
        written, built = load_index(path), build_index(path)
        for name in written.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(written, name), getattr(built, name))


def test_shards_are_ustar_and_evenly_filled(images: Path, tmp_path: Path) -> None:
    write(images, tmp_path / "out", samples_per_shard=10)
    assert [len(load_index(path)) for path in tars(tmp_path / "out")] == [8, 8, 8]
    with tarfile.open(tars(tmp_path / "out")[0]) as tar:
        assert not tar.pax_headers
        assert all(not member.pax_headers for member in tar)


def test_same_seed_same_bytes_and_other_seed_other_order(images: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(images, tmp_path / name / "train", seed=seed)
    a, b, c = (contents(tmp_path / name / "train") for name in "abc")
    assert a == b
    assert a["train-000000.tar"] != c["train-000000.tar"]


def test_unshuffled_shards_follow_the_source(images: Path, tmp_path: Path) -> None:
    source = scan_image_folder(images)
    write_shards(source, tmp_path / "out", samples_per_shard=7, shuffle=False)
    keys = [key for path in tars(tmp_path / "out") for key in load_index(path).keys.tolist()]
    assert keys == [image.key for image in source.images]


def test_the_byte_limit_holds(images: Path, tmp_path: Path) -> None:
    limit = 20_000
    write_shards(scan_image_folder(images), tmp_path / "out", max_shard_bytes=limit)
    sizes = [path.stat().st_size for path in tars(tmp_path / "out")]
    assert len(sizes) > 1
    assert max(sizes) <= limit + tarfile.RECORDSIZE  # a tar is padded to whole records


def test_files_that_are_no_jpeg_are_skipped_and_listed(images: Path, tmp_path: Path) -> None:
    (images / "bee" / "bad.jpg").write_bytes(b"<html>")
    (images / "bee" / "cut.jpg").write_bytes(jpeg(0)[:-10])
    (images / "bee" / "other.png").write_bytes(b"\x89PNG")
    out = tmp_path / "out"
    report = write(images, out)
    assert (report.num_samples, report.num_skipped) == (NUM_IMAGES, 3)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    reasons = {Path(line["path"]).name: line["reason"] for line in skipped}
    assert "HTML" in reasons["bad.jpg"]
    assert "truncated" in reasons["cut.jpg"]
    assert "PNG" in reasons["other.png"]
    assert write(images, out).num_skipped == 3
    assert verify_shards(tars(out)).ok


def test_strict_stops_at_a_bad_file(images: Path, tmp_path: Path) -> None:
    (images / "bee" / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"bad\.jpg: not a JPEG.*strict"):
        write_shards(scan_image_folder(images), tmp_path / "out", strict=True)


def test_a_source_without_any_usable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 1 files"):
        write(tmp_path / "images", tmp_path / "out")


class _Interrupter:
    """Raises KeyboardInterrupt in the writing after a number of images."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 7, 13, 23])
def test_an_interrupted_write_resumes_to_the_same_bytes(
    images: Path, tmp_path: Path, after: int
) -> None:
    (images / "bee" / "bad.jpg").write_bytes(b"junk")
    source = scan_image_folder(images)
    whole, parts = tmp_path / "whole" / "train", tmp_path / "parts" / "train"
    write_shards(source, whole, samples_per_shard=5)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, parts, samples_per_shard=5, workers=1, progress=_Interrupter(after))
    assert not list(parts.glob(".*"))
    assert not json.loads((parts / "dataset.json").read_text())["complete"]
    finished = {path: path.stat().st_mtime_ns for path in tars(parts)}
    assert len(finished) < 5

    report = write_shards(source, parts, samples_per_shard=5)

    assert report.num_already_written == len(finished)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    assert contents(parts) == contents(whole)


def test_an_interrupt_stops_the_other_threads_within_their_shard(
    images: Path, tmp_path: Path
) -> None:
    threads: list[int] = []

    def interrupt_the_first_thread(amount: int) -> None:
        threads.append(threading.get_ident())
        time.sleep(0.1 * amount)  # so that both threads have begun
        if amount and threads[1] == threading.get_ident():  # threads[0] is the main thread
            raise KeyboardInterrupt

    source = scan_image_folder(images)
    with pytest.raises(KeyboardInterrupt):
        write_shards(
            source,
            tmp_path / "out",
            samples_per_shard=5,
            workers=2,
            progress=interrupt_the_first_thread,
        )
    assert not tars(tmp_path / "out")  # a thread that went on would have finished its shard


def test_what_a_kill_leaves_behind_is_repaired(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(images, out)
    before = contents(out)
    index_path(tars(out)[1]).unlink()  # killed between the tar and its index
    tars(out)[2].unlink()
    (out / ".out-000002.tar.123.partial").write_bytes(b"half")
    (out / "dataset.json").write_text(
        (out / "dataset.json").read_text().replace('"complete": true', '"complete": false')
    )
    assert write(images, out).num_already_written == 3
    assert contents(out) == before


def test_other_settings_or_another_source_are_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(images, out)
    with pytest.raises(ValueError, match="samples_per_shard: 5 -> 6"):
        write(images, out, samples_per_shard=6)
    with pytest.raises(ValueError, match="seed: 0 -> 3"):
        write(images, out, seed=3)
    (images / "bee" / "new.jpg").write_bytes(jpeg(77))
    with pytest.raises(ValueError, match="the source images"):
        write(images, out)


def test_a_moved_source_may_continue(images: Path, tmp_path: Path) -> None:
    write(images, tmp_path / "out")
    moved = images.rename(tmp_path / "elsewhere")
    assert write(moved, tmp_path / "out").num_already_written == 5


def test_a_folder_with_foreign_shards_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.tar").touch()
    with pytest.raises(ValueError, match=r"1 tar file\(s\) such as other\.tar"):
        write(images, tmp_path / "out")


def test_a_source_that_changes_while_it_is_written_is_noticed(images: Path, tmp_path: Path) -> None:
    source = scan_image_folder(images)
    (images / "bee" / "002.jpg").write_bytes(jpeg(500, (60, 60)))
    with pytest.raises(ValueError, match=r"002\.jpg had .* bytes when it was listed"):
        write_shards(source, tmp_path / "out")


def test_a_full_disk_is_noticed_before_writing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="make room"):
        write(images, tmp_path / "out")
    assert not tars(tmp_path / "out")


@pytest.mark.parametrize("value", [{"samples_per_shard": 0}, {"max_shard_bytes": 0}])
def test_settings_out_of_range_are_refused(tmp_path: Path, value: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_shards(ImageSource((), (), 0), tmp_path / "out", **value)  # type: ignore[arg-type]


# --- verifying ------------------------------------------------------------------------------------


@pytest.fixture
def written(images: Path, tmp_path: Path) -> list[Path]:
    write(images, tmp_path / "train")
    return tars(tmp_path / "train")


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_flipped_bit_is_found_and_named(
    written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small shards lie within the digest's reach: look past it, as for the middle of a large one.
    index = load_index(written[1])
    overwrite(written[1], int(index.offset[2]) + 900, b"\x55")
    monkeypatch.setattr("cmae.pipeline.index.tar_digest", lambda path: index.tar_digest)
    report = verify_shards(written[1:2])
    assert [problem.key for problem in report.problems] == [index.keys[2]]
    assert "CRC32" in report.problems[0].what


def test_damaged_shards_are_found(written: list[Path]) -> None:
    index = load_index(written[0])
    overwrite(written[0], int(index.offset[1]) + 700, b"\0" * 100)
    overwrite(written[1], int(load_index(written[1]).offset[1]) - 512, b"\0" * 512)
    with open(written[2], "r+b") as file:
        file.truncate(int(load_index(written[2]).offset[1]) + 10)
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
    end = int(index.offset[-1] + -(-index.size[-1] // 512) * 512)
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


# --- looking --------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_images(images: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (100, 50)).save(images / "bee" / "grey.jpg", exif=exif)
    out = tmp_path / "out"
    write(images, out)
    facts = shard_statistics(tars(out))
    sizes = [path.stat().st_size for path in images.rglob("*.*")]
    assert facts.num_samples == len(sizes) == 25
    assert facts.samples_per_shard == (5, 5)
    assert facts.image_bytes == sum(sizes)
    assert facts.bytes_at[0] == min(sizes)
    assert facts.bytes_at[-1] == max(sizes)
    assert facts.width_at[-1] == 100
    assert facts.megapixels_at[3] == pytest.approx(40 * 30 / 1e6)
    assert facts.kinds == {"baseline": 24, "grayscale": 1}
    assert facts.orientations == {1: 24, 6: 1}
    assert facts.class_counts == {0: 8, 1: 9, 2: 8}
    assert (facts.num_unlabelled, facts.num_bad) == (0, 0)


def test_the_contact_sheet_shows_the_images_in_order(tmp_path: Path) -> None:
    colours = [(200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20), (20, 200, 200)]
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.new("RGB", (90, 60), colour).save(root / f"{i}.jpg", quality=95)
    source = scan_image_folder(root.parent)
    write_shards(source, tmp_path / "out", shuffle=False, samples_per_shard=2)
    path = contact_sheet(
        tars(tmp_path / "out"), tmp_path / "sheet.png", num_images=10, columns=3, cell_px=64
    )
    with Image.open(path) as sheet:
        gap = 4
        step = (sheet.width - gap) // 3
        line = (sheet.height - gap) // 2
        seen = [
            sheet.getpixel((gap + (i % 3) * step + 32, gap + (i // 3) * line + 32))
            for i in range(5)
        ]
    np.testing.assert_allclose(seen, colours, atol=6)


# --- real data ------------------------------------------------------------------------------------


def test_real_imagenet_goes_through_shards_unchanged(
    imagenet_sample: list[Path], tmp_path: Path
) -> None:
    expected: dict[str, tuple[bytes, int]] = {}
    for shard in imagenet_sample:
        with open(shard, "rb") as file:
            for record in iter_records(file, name=shard.name):
                folder = tmp_path / "images" / f"{record.label:04d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{record.key}.JPEG").write_bytes(record.image)
                expected[f"{record.label:04d}/{record.key}"] = (record.image, record.label)
    source = scan_image_folder(tmp_path / "images")
    report = write_shards(source, tmp_path / "train", samples_per_shard=128)
    assert (report.num_shards, report.num_samples, report.num_skipped) == (4, 500, 0)
    assert verify_shards(tars(tmp_path / "train")).ok
    read = read_with_webdataset(tmp_path / "train")
    assert {key: image for key, (image, _) in read.items()} == {
        key: image for key, (image, _) in expected.items()
    }
    assert all(int(source.classes[label]) == expected[key][1] for key, (_, label) in read.items())
