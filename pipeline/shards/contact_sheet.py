"""A picture of some samples of a data set, with their labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cmae.pipeline.formats.dataset_folder import load_classes
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.images.jpeg import BadImageError
from cmae.pipeline.formats.images.pixels import decode_jpeg
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.printable import printable


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
        num_images: Largest number of images; fewer where the shards hold fewer.
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
    shard, record_number = index.locate(row)
    path = index.paths[int(shard)]
    with open(path, "rb") as file:
        data = os.pread(file.fileno(), int(index.size[row]), int(index.byte_offset[row]))
    try:
        image = decode_jpeg(data, draft_px=2 * side)
    except BadImageError:  # `cmae shards verify --decode pil` names it
        image = Image.new("RGB", (side, side), _FAINT_INK)
    picture = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    font = ImageFont.load_default(max(side // 14, 9))
    # The bitmap font is for Pillow without FreeType.
    assert isinstance(font, ImageFont.FreeTypeFont)
    line_px = int(1.35 * font.size)
    cell = Image.new("RGB", (side, side + 2 * line_px + 4), _BACKGROUND)
    cell.paste(picture)
    draw = ImageDraw.Draw(cell)
    label = int(index.label[row])
    names = load_classes(Path(path).parent)
    label_text = "no label" if label == NO_LABEL else str(label)
    if names and 0 <= label < len(names):
        label_text += f" {printable(names[label])}"
    size_text = f"{index.width[row]}x{index.height[row]}"
    key = _shorten(printable(index.key(int(shard), int(record_number))), side, font)
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
