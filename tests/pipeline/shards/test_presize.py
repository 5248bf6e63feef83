"""Downscaled shards: which images change, how they are labelled, and that the label gets everywhere."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.loaders import loader_of
from support.pipeline_data import jpeg, photo, toy_mask
from support.shard_data import contents, tars

from cmae.pipeline import ViewConfig
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.images.jpeg import BadImageError, inspect_jpeg
from cmae.pipeline.formats.presized import downscale_mark
from cmae.pipeline.formats.shard_index import (
    StaleIndexError,
    build_index,
    index_path,
    load_index,
    save_index,
)
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.presize import downscale_jpeg, needs_downscale
from cmae.pipeline.shards.verify import verify_shards
from cmae.pipeline.shards.write import WriteReport, write_shards
from cmae.train.commands import shards as shards_cli

SIZES = [(60, 90), (64, 200), (65, 80), (130, 100), (40, 300), (200, 200)]
LARGE = [2, 3, 5]  # those whose shorter side exceeds 64
LINE = "3 of 6 images downscaled (max_size 64, quality 95)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (height, width) in enumerate(SIZES):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(best_jpeg(photo(height, width, seed=number)))
    return tmp_path / "images"


def best_jpeg(pixels: np.ndarray) -> bytes:
    """Of a quality that any other makes smaller."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=99, subsampling="4:4:4")
    return file.getvalue()


def write(folder: Path, out: Path, *, max_size: int | None = 64, quality: int = 95) -> WriteReport:
    source = scan_image_folder(folder)
    return write_shards(source, out, samples_per_shard=2, max_size=max_size, quality=quality)


def stored_files(out: Path) -> dict[str, bytes]:
    files = {}
    for path in tars(out):
        index, data = load_index(path), path.read_bytes()
        for key, offset, size in zip(index.keys, index.byte_offset, index.size, strict=True):
            files[Path(str(key)).name] = data[offset : offset + size]
    return files


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


def test_only_large_images_change_and_the_others_keep_every_byte(
    folder: Path, tmp_path: Path
) -> None:
    write(folder, tmp_path / "train")
    stored = stored_files(tmp_path / "train")
    assert len(stored) == len(SIZES)
    for path in folder.rglob("*.jpg"):
        original, number = path.read_bytes(), int(path.stem)
        assert (stored[path.stem] != original) == (number in LARGE), number
        if number in LARGE:
            height, width = SIZES[number]
            size = (round(height * 64 / min(height, width)), round(width * 64 / min(height, width)))
            assert pixels(stored[path.stem]).shape[:2] == size


def test_a_file_that_would_not_get_smaller_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    poor = io.BytesIO()
    Image.fromarray(photo(80, 100)).save(poor, "JPEG", quality=20)
    (folder / "class1" / "poor.jpg").write_bytes(poor.getvalue())
    report = write(folder, tmp_path / "train")
    assert stored_files(tmp_path / "train")["poor"] == poor.getvalue()
    assert report.downscaled == {"max_size 64, quality 95": 3}


def test_a_resized_image_is_the_antialiased_picture(folder: Path) -> None:
    original = jpeg(photo(256, 320, seed=1), subsampling=0)
    resized = downscale_jpeg(original, inspect_jpeg(original), max_size=64, quality=95)
    block_means = pixels(original).reshape(64, 4, 80, 4, 3).mean((1, 3))
    inside = np.abs(pixels(resized) - block_means)[2:-2, 2:-2]
    # Every fourth pixel alone is 5 levels away: the noise is not averaged.
    assert inside.mean() < 2.5
    assert np.abs(pixels(original)[2::4, 2::4] - block_means)[2:-2, 2:-2].mean() > 4


def test_orientation_and_grey_stay_and_cmyk_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(photo(100, 120), exif=exif)
    info = inspect_jpeg(downscale_jpeg(turned, inspect_jpeg(turned), max_size=50, quality=95))
    assert (info.height, info.width, info.orientation) == (50, 60, 6)

    grey = jpeg(Image.fromarray(photo(100, 120)).convert("L"))
    small = downscale_jpeg(grey, inspect_jpeg(grey), max_size=50, quality=95)
    assert inspect_jpeg(small).kind == inspect_jpeg(grey).kind
    assert downscale_mark(small) == "120x100 -> 60x50, max_size 50, quality 95"

    cmyk = inspect_jpeg(jpeg(Image.fromarray(photo(100, 120)).convert("CMYK")))
    assert not needs_downscale(cmyk, 50)
    assert needs_downscale(inspect_jpeg(grey), 50)
    assert not needs_downscale(inspect_jpeg(grey), 100)


def test_a_file_that_does_not_decode_is_skipped_with_its_reason(
    folder: Path, tmp_path: Path
) -> None:
    good = (folder / "class1" / "5.jpg").read_bytes()
    start = good.index(b"\xff\xc4")  # the Huffman tables: the header walk passes over them
    bad = good[: start + 5] + b"\xff" * 40 + good[start + 45 :]
    (folder / "class1" / "bad.jpg").write_bytes(bad)
    with pytest.raises(BadImageError, match="cannot be resized"):
        downscale_jpeg(bad, inspect_jpeg(bad), max_size=64, quality=95)
    report = write(folder, tmp_path / "train")
    assert (report.num_samples, report.num_skipped) == (6, 1)
    assert "cannot be resized" in (tmp_path / "train" / "skipped.jsonl").read_text()


def test_writing_again_continues_and_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "a" / "train")
    write(folder, tmp_path / "b" / "train")
    complete = contents(tmp_path / "a" / "train")
    assert contents(tmp_path / "b" / "train") == complete
    tars(tmp_path / "b" / "train")[1].unlink()
    report = write(folder, tmp_path / "b" / "train")
    assert report.num_already_written == 2
    assert report.downscaled == {"max_size 64, quality 95": 3}
    assert contents(tmp_path / "b" / "train") == complete


def test_another_size_or_quality_is_refused_in_the_same_folder(
    folder: Path, tmp_path: Path
) -> None:
    write(folder, tmp_path / "train")
    with pytest.raises(ValueError, match="max_size: 64 -> 48"):
        write(folder, tmp_path / "train", max_size=48)
    with pytest.raises(ValueError, match="quality: 95 -> 90"):
        write(folder, tmp_path / "train", quality=90)
    with pytest.raises(ValueError, match="max_size: 64 -> None"):
        write(folder, tmp_path / "train", max_size=None)
    with pytest.raises(ValueError, match="max_size=8 must be at least 16"):
        write(folder, tmp_path / "other", max_size=8)
    with pytest.raises(ValueError, match="quality=0 must be"):
        write(folder, tmp_path / "other", quality=0)


def test_the_label_is_in_the_files_the_index_and_the_summary(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    write(folder, out)
    marked = {key for key, data in stored_files(out).items() if downscale_mark(data)}
    assert marked == {str(number) for number in LARGE}
    assert DatasetIndex.load(tars(out)).downscaled == {"max_size 64, quality 95": 3}
    assert json.loads((out / "dataset.json").read_text())["presized"] == {
        "max_size 64, quality 95": 3
    }
    for path in tars(out):  # a new index finds the label in the images
        before = load_index(path)
        index_path(path).unlink()
        save_index(build_index(path), index_path(path))
        assert load_index(path).downscaled == before.downscaled


def test_copying_labelled_images_keeps_the_label(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "train")
    for key, data in stored_files(tmp_path / "train").items():
        path = tmp_path / "again" / "one" / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    report = write(tmp_path / "again", tmp_path / "copy", max_size=None)
    assert report.downscaled == {"max_size 64, quality 95": 3}


def test_index_files_of_original_images_stay_readable_by_older_versions(
    folder: Path, tmp_path: Path
) -> None:
    write(folder, tmp_path / "plain", max_size=None)
    write(folder, tmp_path / "small")
    versions = {}
    for name in ("plain", "small"):
        for path in tars(tmp_path / name):
            with np.load(index_path(path)) as archive:
                has_label = "presized_settings" in archive.files
                assert int(archive["format_version"]) == (2 if has_label else 1)
                versions.setdefault(name, set()).add(int(archive["format_version"]))
    assert versions["plain"] == {1}
    assert 2 in versions["small"]


def test_an_index_of_a_later_format_is_refused(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "train")
    path = tars(tmp_path / "train")[0]
    with np.load(index_path(path)) as archive:
        columns = dict(archive) | {"format_version": np.int64(3)}
    with index_path(path).open("wb") as file:
        np.savez(file, **columns)
    with pytest.raises(StaleIndexError, match="format 3"):
        load_index(path)


def test_verify_notes_it_and_finds_an_index_that_hides_it(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "train")
    report = verify_shards(tars(tmp_path / "train"))
    assert report.ok
    assert LINE in report.notes
    path = next(path for path in tars(tmp_path / "train") if load_index(path).downscaled)
    index = load_index(path)
    index.downscaled.clear()
    save_index(index, index_path(path))
    (problem,) = verify_shards(tars(tmp_path / "train")).problems
    assert "downscaled images are" in problem.what


@pytest.mark.parametrize("source", ["indexed", "stream"])
def test_the_loader_says_it(
    folder: Path, tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    write(folder, tmp_path / "train")
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8, color="none")
    with loader_of(
        str(tmp_path / "train"),
        views,
        batch_size=2,
        global_batch_size=2,
        draw_mask=toy_mask,
        num_threads=1,
        source=source,  # type: ignore[arg-type]
    ) as loader:
        assert loader.downscaled == LINE
        assert next(loader).online.shape == (2, 32, 32, 3)


def test_the_command_writes_and_shows_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train"
    assert shards_cli.write(folder, out, max_size=64) == 0
    assert LINE in capsys.readouterr().out
    assert shards_cli.inspect(str(out)) == 0
    assert "downscaled" in capsys.readouterr().out
    assert shards_cli.verify(str(out)) == 0
    assert f"note: {LINE}" in capsys.readouterr().out
