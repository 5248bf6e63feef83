"""Small real data for the demo: tiles of the photographs that come with scikit-image, as JPEG shards.

A photograph is a class, and a grid of square cells lies over it. Validation tiles lie wholly inside held-out
cells, training tiles touch none of these, so no pixel is in both splits. Every tile is brought to the same
mean colour and contrast: structure is left to tell the photographs apart, not the light they were taken in.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cmae.errors import CmaeError
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.write import write_shards

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
"""Names in `skimage.data`; all of them are files of the wheel, nothing is downloaded."""

SHORT_SIDE_PX = 448
"""Every photograph is scaled to this, so that resolution does not tell them apart."""
TILE_PX = 96
CELL_PX = 112
"""Side of the cells; every fifth one is held out, no two of them side by side."""
TRAIN_STRIDE_PX = 16
VAL_STRIDE_PX = 8
JPEG_QUALITY = 90
TILE_MEAN, TILE_STD = 128.0, 48.0
"""What every tile's channels, and its contrast over all of them, are brought to (0..255)."""


class Windows(NamedTuple):
    """Upper left corners (y, x) of tiles in one photograph."""

    train: list[tuple[int, int]]
    val: list[tuple[int, int]]


class TileCounts(NamedTuple):
    """Tiles of all photographs."""

    train: int
    val: int


def load_photograph(name: str) -> UInt8[np.ndarray, "H W 3"]:
    """A photograph of scikit-image in RGB, its shorter side scaled to `SHORT_SIDE_PX`.

    Raises:
        CmaeError: scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError as error:
        raise CmaeError(
            "the demo's photographs come with scikit-image, which is not installed; "
            "`pip install scikit-image`, or `pip install 'cmae[demo]'`"
        ) from error
    pixels = getattr(skimage.data, name)()
    if name == "stereo_motorcycle":
        pixels = pixels[0]
    image = Image.fromarray(pixels).convert("RGB")
    scale = SHORT_SIDE_PX / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def tile_windows(height: int, width: int) -> Windows:
    """All tiles of a photograph of this size: training tiles share no pixel with validation tiles."""
    cells = [
        (top, left)
        for row, top in enumerate(range(0, height - CELL_PX + 1, CELL_PX))
        for column, left in enumerate(range(0, width - CELL_PX + 1, CELL_PX))
        if (2 * row + column) % 5 == 0
    ]
    offsets = range(0, CELL_PX - TILE_PX + 1, VAL_STRIDE_PX)
    val = [(top + y, left + x) for top, left in cells for y in offsets for x in offsets]
    train = [
        (y, x)
        for y in range(0, height - TILE_PX + 1, TRAIN_STRIDE_PX)
        for x in range(0, width - TILE_PX + 1, TRAIN_STRIDE_PX)
        if not any(_meets_cell(y, top) and _meets_cell(x, left) for top, left in cells)
    ]
    return Windows(train, val)


def write_demo_shards(
    out: Path, *, max_train: int = 200, max_val: int = 40, seed: int = 0
) -> TileCounts:
    """Cut all photographs into `out/tiles/{train,val}/<photograph>/` and write `out/shards/{train,val}/`.

    Writing again changes nothing.

    Args:
        out: folder; made if missing.
        max_train: training tiles of a photograph, chosen at random among all.
        max_val: validation tiles of a photograph, likewise.
        seed: Seed of that choice.

    Raises:
        CmaeError: scikit-image is not installed, or `out` holds shards of other tiles.
    """
    for number, name in enumerate(PHOTOGRAPHS):
        photograph = load_photograph(name)
        generator = np.random.default_rng([seed, number])
        windows = tile_windows(*photograph.shape[:2])
        for split, corners, limit in (
            ("train", windows.train, max_train),
            ("val", windows.val, max_val),
        ):
            chosen = generator.permutation(len(corners))[:limit]
            _write_tiles(photograph, [corners[i] for i in chosen], out / "tiles" / split / name)
    reports = [
        write_shards(
            scan_image_folder(out / "tiles" / split), out / "shards" / split, samples_per_shard=800
        )
        for split in ("train", "val")
    ]
    return TileCounts(*(report.num_samples for report in reports))


def equalise(tile: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Take away a tile's colour cast, brightness and contrast; colours within the tile stay."""
    centred = tile - tile.mean(axis=(0, 1))
    contrast = centred.std() + 4.0  # 4: what is flat stays almost flat, its noise is not blown up
    equal: UInt8[np.ndarray, "H W 3"] = (
        np.clip(TILE_MEAN + TILE_STD * centred / contrast, 0, 255).round().astype(np.uint8)
    )
    return equal


def _write_tiles(
    photograph: UInt8[np.ndarray, "H W 3"], corners: list[tuple[int, int]], folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for y, x in corners:
        tile = equalise(photograph[y : y + TILE_PX, x : x + TILE_PX])
        Image.fromarray(tile).save(folder / f"y{y:03d}_x{x:03d}.jpg", quality=JPEG_QUALITY)


def _meets_cell(tile: int, cell: int) -> bool:
    """Whether a tile and a held-out cell overlap along one axis."""
    return tile < cell + CELL_PX and cell < tile + TILE_PX
