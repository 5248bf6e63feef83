from __future__ import annotations

import json
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from support.shard_data import NUM_IMAGES, contents, jpeg, read_with_webdataset, tars, write

from cmae.errors import CmaeError
from cmae.pipeline.formats.shard_index import build_index, index_path, load_index
from cmae.pipeline.formats.shard_tar import ShardTar
from cmae.pipeline.formats.tar import iter_records
from cmae.pipeline.shards import output_folder
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.originals.source import ImageSource
from cmae.pipeline.shards.output_folder import tidy_skipped
from cmae.pipeline.shards.verify import VerifyReport, verify_shards
from cmae.pipeline.shards.write import write_shards


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


def test_webdataset_reads_back_every_byte_and_label(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    report = write(images, out)
    num_bytes = sum(path.stat().st_size for path in tars(out))
    assert report[:6] == (5, 0, NUM_IMAGES, 0, num_bytes, {})
    assert report.num_missing == 0
    assert report.files.counts == {"image": NUM_IMAGES}
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
    found = verify_shards(tars(out), decode="pil")
    assert found.members.counts == {"image": NUM_IMAGES, "label": NUM_IMAGES}
    assert found == VerifyReport(
        5, NUM_IMAGES, report.num_bytes, problems=(), notes=(), members=found.members
    )


def test_the_index_written_along_is_the_one_built_afterwards(images: Path, tmp_path: Path) -> None:
    write(images, tmp_path / "out")
    for path in tars(tmp_path / "out"):
        written, built = load_index(path), build_index(path)
        for name in written.__dataclass_fields__.keys() - {"tar_sha256"}:  # only the writer knows
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


class TestParts:
    """Several machines write to one folder."""

    @pytest.mark.parametrize("num_parts", [2, 3, 8])
    def test_any_number_in_any_order_writes_the_same_bytes(
        self, images: Path, tmp_path: Path, num_parts: int
    ) -> None:
        (images / "bee" / "bad.jpg").write_bytes(b"<html>")
        (images / "ant" / "bad.jpg").write_bytes(b"<html>")
        write(images, tmp_path / "one" / "train")
        for part in reversed(range(num_parts)):
            report = write(images, tmp_path / "many" / "train", num_parts=num_parts, part=part)
            assert (report.num_missing == 0) == (part == 0)
        assert contents(tmp_path / "many" / "train") == contents(tmp_path / "one" / "train")
        assert (report.num_shards, report.num_skipped) == (6, 2)

    def test_at_the_same_time(self, images: Path, tmp_path: Path) -> None:
        (images / "bee" / "bad.jpg").write_bytes(b"<html>")
        write(images, tmp_path / "one" / "train")
        with ThreadPoolExecutor(4) as pool:
            parts = [
                pool.submit(write, images, tmp_path / "many" / "train", num_parts=4, part=part)
                for part in range(4)
            ]
            reports = [part.result() for part in parts]
        assert contents(tmp_path / "many" / "train") == contents(tmp_path / "one" / "train")
        assert any(report.num_missing == 0 for report in reports)

    def test_a_part_begun_again_writes_what_it_lacks_and_leaves_the_others_alone(
        self, images: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "train"
        write(images, tmp_path / "one" / "train")
        for part in range(2):
            write(images, out, num_parts=2, part=part)
        (out / "train-000002.tar").unlink()
        mine, others = (
            out / ".train-000002.tar.1234abcd.partial",
            out / ".train-000003.tar.12.partial",
        )
        mine.write_bytes(b"half")
        others.write_bytes(b"half")
        assert write(images, out, num_parts=2, part=0).num_already_written == 2
        assert not mine.exists()
        assert others.exists()
        others.unlink()
        assert contents(out) == contents(tmp_path / "one" / "train")

    def test_an_unfinished_folder_says_so(self, images: Path, tmp_path: Path) -> None:
        report = write(images, tmp_path / "train", num_parts=3, part=1)
        assert (report.num_shards, report.num_missing) == (2, 3)
        assert json.loads((tmp_path / "train" / "dataset.json").read_text())["complete"] is False

    @pytest.mark.parametrize(("num_parts", "part"), [(2, 2), (2, -1), (0, 0)])
    def test_a_part_that_there_is_not_is_refused(
        self, images: Path, tmp_path: Path, num_parts: int, part: int
    ) -> None:
        with pytest.raises(CmaeError, match="num_parts"):
            write(images, tmp_path / "train", num_parts=num_parts, part=part)


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
    with pytest.raises(ValueError, match="the source"):
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
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="make room"):
        write(images, tmp_path / "out")
    assert not tars(tmp_path / "out")


@pytest.mark.parametrize("value", [{"samples_per_shard": 0}, {"max_shard_bytes": 0}])
def test_settings_out_of_range_are_refused(tmp_path: Path, value: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        write_shards(ImageSource((), ()), tmp_path / "out", **value)  # type: ignore[arg-type]


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


def test_a_written_tar_is_the_one_that_webdataset_writes(tmp_path: Path) -> None:
    members = {"a": jpeg(0), "ü" * 70: jpeg(1), "folder/" + "l" * 95: b"x" * 512, "e": b""}
    with wds.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0) as theirs:
        for key, data in members.items():
            theirs.write({"__key__": key, "jpg": data})
    with open(tmp_path / "ours.tar", "wb") as file:
        ours = ShardTar(file)
        for key, data in members.items():
            ours.add(f"{key}.jpg", data)
        ours.end()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_damaged_lines_of_the_skipped_files_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "skipped.jsonl"
    good = [{"shard": number, "path": f"{number}.jpg", "reason": "x"} for number in range(3)]
    damage = [bytes(512), b"[" * 100_000, b'{"shard": "a", "path": "b", "reason": 3}', b'{"shard"']
    lines = [json.dumps(one).encode() for one in good]
    path.write_bytes(b"\n".join([lines[2], *damage, *lines[:2]]))
    assert tidy_skipped(path) == good
    assert "4 damaged line(s) left out" in caplog.text
    assert tidy_skipped(path) == good
    assert len(caplog.messages) == 1
