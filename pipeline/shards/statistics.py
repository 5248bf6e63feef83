"""Look at shards: statistics from their indices, class names, and a sheet of sample images."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cmae.pipeline.dataset_index import DatasetIndex
from cmae.pipeline.jpeg import JpegKind
from cmae.pipeline.presize import presized_line, sum_counts
from cmae.pipeline.shards import CLASSES_FILE, DATASET_FILE
from cmae.pipeline.tar import NO_LABEL
from cmae.pipeline.urls import is_local


@dataclass(frozen=True)
class ShardStatistics:
    """Facts about the samples of some shards, from their indices alone."""

    num_shards: int
    num_samples: int
    """Images that can be decoded."""
    num_bad: int
    """Images that cannot."""
    samples_per_shard: tuple[int, int]
    """Smallest and largest."""
    image_bytes: int
    """Sum over all images."""
    presized: dict[str, int]
    """Images re-encoded by `cmae shards write --max-size`, by setting."""
    percentiles: tuple[int, ...]
    """Which percentiles the next four give."""
    bytes_at: tuple[int, ...]
    """Bytes of an image."""
    megapixels_at: tuple[float, ...]
    width_at: tuple[int, ...]
    height_at: tuple[int, ...]
    kinds: dict[str, int]
    """Images of each JpegKind, most frequent first."""
    orientations: dict[int, int]
    """Images of each EXIF orientation."""
    num_unlabelled: int
    class_counts: dict[int, int]
    """Images of each label that occurs."""


def shard_statistics(shards: Sequence[str | Path]) -> ShardStatistics:
    """Summarise shards from their indices; no image is read.

    Raises:
        FileNotFoundError, StaleIndexError: See `DatasetIndex.load`.
    """
    index = DatasetIndex.load(shards)
    at = (0, 5, 25, 50, 75, 95, 100)
    labels, counts = np.unique(index.label[index.label != NO_LABEL], return_counts=True)
    kinds = Counter(index.kind.tolist()).most_common()
    pixels = index.height.astype(np.int64) * index.width
    return ShardStatistics(
        num_shards=len(index.paths),
        num_samples=len(index),
        num_bad=index.num_bad,
        samples_per_shard=(int(index.shard_sizes.min()), int(index.shard_sizes.max())),
        image_bytes=int(index.size.sum()),
        presized=index.presized,
        percentiles=at,
        bytes_at=tuple(map(int, np.percentile(index.size, at))),
        megapixels_at=tuple(float(x) for x in np.percentile(pixels / 1e6, at)),
        width_at=tuple(map(int, np.percentile(index.width, at))),
        height_at=tuple(map(int, np.percentile(index.height, at))),
        kinds={JpegKind(kind).name.lower(): count for kind, count in kinds},
        orientations=dict(sorted(Counter(index.orientation.tolist()).items())),
        num_unlabelled=int((index.label == NO_LABEL).sum()),
        class_counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
    )


def load_classes(folder: str | Path) -> list[str] | None:
    """Class names beside the shards, by label; None where there is no `classes.json`."""
    path = Path(folder) / CLASSES_FILE
    return [str(name) for name in json.loads(path.read_text())] if path.exists() else None


def stated_presized(shards: Sequence[str]) -> str:
    """What `dataset.json` beside local tars says of pre-resized images; '' where there is no such file.

    For tars that are read without an index. The counts are those of the whole folder.
    """
    folders = {Path(shard).parent for shard in shards if is_local(shard)}
    summaries = [
        json.loads(path.read_text())
        for folder in sorted(folders)
        if (path := folder / DATASET_FILE).exists()
    ]
    counts = sum_counts(summary.get("presized", {}) for summary in summaries)
    return presized_line(counts, sum(summary.get("num_samples", 0) for summary in summaries))


def contact_sheet(
    shards: Sequence[str | Path],
    out_path: str | Path,
    *,
    num_images: int = 40,
    columns: int = 8,
    cell_px: int = 176,
) -> Path:
    """Draw images spread evenly over the shards, as stored, with key and label; return `out_path`.

    Args:
        shards: Local tar files with indices.
        out_path: A .png file.
        num_images: At most; fewer where the shards hold fewer.
        columns: Images in a row.
        cell_px: Side of the square that an image is cropped to, in pixels.
    """
    index = DatasetIndex.load(shards)
    count = min(num_images, len(index))
    rows = (np.arange(count) + 0.5) * len(index) / count
    cells = [_draw_cell(index, int(row), cell_px) for row in rows]
    gap = cell_px // 16
    width, height = cells[0].size
    lines = -(-count // columns)
    columns = min(columns, count)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), _BACKGROUND
    )
    for i, cell in enumerate(cells):
        line, column = divmod(i, columns)
        sheet.paste(cell, (gap + column * (width + gap), gap + line * (height + gap)))
    sheet.save(out_path, format="PNG")
    return Path(out_path)


_BACKGROUND, _INK, _FAINT_INK = "#ffffff", "#1a1a1a", "#767676"


def _draw_cell(index: DatasetIndex, row: int, side: int) -> Image.Image:
    """A square image over two lines of text: the key, then label and stored size."""
    shard, position = index.locate(row)
    path = index.paths[int(shard)]
    with open(path, "rb") as file:
        data = os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * side, 2 * side))
        picture = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    font = ImageFont.load_default(max(side // 14, 9))
    assert isinstance(
        font, ImageFont.FreeTypeFont
    )  # the bitmap font is for Pillow without FreeType
    line_px = int(1.35 * font.size)
    cell = Image.new("RGB", (side, side + 2 * line_px + 4), _BACKGROUND)
    cell.paste(picture)
    draw = ImageDraw.Draw(cell)
    label = int(index.label[row])
    names = load_classes(Path(path).parent)
    label_text = "no label" if label == NO_LABEL else str(label)
    if names and 0 <= label < len(names):
        label_text += f" {names[label]}"
    size_text = f"{index.width[row]}x{index.height[row]}"
    key = _shorten(index.key(int(shard), int(position)), side, font)
    draw.text((0, side + 4), key, fill=_INK, font=font)
    draw.text((0, side + 4 + line_px), label_text, fill=_FAINT_INK, font=font)
    draw.text((side, side + 4 + line_px), size_text, fill=_FAINT_INK, font=font, anchor="ra")
    return cell


def _shorten(text: str, width_px: int, font: ImageFont.FreeTypeFont) -> str:
    """Cut the start: the end of a key tells samples apart."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength("…" + text) > width_px:
        text = text[1:]
    return "…" + text
