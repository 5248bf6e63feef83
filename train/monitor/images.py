"""Image grids to look at: the first batch of a run, and what a model paints where it sees nothing."""

from __future__ import annotations

from functools import cache
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from cmae.errors import CmaeError
from cmae.model import CMAE
from cmae.model.export.images import to_pixels
from cmae.pipeline import Batch
from cmae.pipeline.formats.images.jpeg import BadImageError
from cmae.pipeline.formats.images.pixels import decode_any

Panel = UInt8[np.ndarray, "S S 3"]

GRAY = 205
"""Of what is hidden."""
PANEL_PX, ROWS = 144, 4
"""Side to which small images are enlarged, about; and rows before the grid goes on to the right."""
GAP_PX, MARGIN_PX, TITLE_PX = 6, 18, 26
INK, PAPER = (40, 40, 40), (255, 255, 255)


@torch.no_grad()
def predict_pixels(
    model: CMAE, online: UInt8[Tensor, "B S S 3"], ids_keep: Int[Tensor, "B K"]
) -> Float[Tensor, "B N row"]:
    """Rows of `CMAE.reconstruct`, in evaluation mode."""
    was_training = model.training
    model.eval()
    rows = model.reconstruct(online, ids_keep)
    model.train(was_training)
    return rows


@torch.no_grad()
def draw_reconstructions(
    model: CMAE,
    online: UInt8[Tensor, "B S S 3"],
    ids_keep: Int[Tensor, "B K"],
    path: Path,
    *,
    rows: Float[Tensor, "B N row"] | None = None,
) -> None:
    """Write a PNG with original, masked input and reconstruction side by side.

    In the reconstruction, visible patches are the original's. With norm_pix_loss each predicted patch gets
    the mean and the scale of the true one, which the network is not asked for.

    Args:
        model: Model that predicts; its configuration alone is used where `rows` are given.
        online: Images.
        ids_keep: Visible patches.
        path: PNG to write.
        rows: Predicted pixels of all patches, as `CMAE.reconstruct` has them; None: they are computed.

    Raises:
        CmaeError: the model has no pixel decoder, or images and ids do not fit it.
    """
    rows = predict_pixels(model, online, ids_keep) if rows is None else rows
    predicted = to_pixels(model.config, rows, online).clamp(0, 255).round().to(torch.uint8).cpu()
    online = online.cpu()
    hidden = _hidden_pixels(online, ids_keep.cpu(), model.config.num_patches)
    columns = {
        "original": online,
        "masked input": _paint_gray(online, hidden),
        "reconstruction": torch.where(hidden, predicted, online),
    }
    draw_grid({title: list(images.numpy()) for title, images in columns.items()}, path)


def first_batch_grid(batch: Batch, path: Path, *, num_images: int = 8) -> None:
    """Draw the online view, the target view and the masked online view of the first images of a batch."""
    online = batch.online[:num_images].cpu()
    ids_keep, ids_mask = batch.masks
    num_patches = ids_keep.shape[1] + ids_mask.shape[1]
    hidden = _hidden_pixels(online, ids_keep[:num_images].cpu(), num_patches)
    columns = {"online view": online, "online, masked": _paint_gray(online, hidden)}
    if batch.target is not None:
        columns["target view"] = batch.target[:num_images].cpu()
    draw_grid({title: list(images.numpy()) for title, images in columns.items()}, path)


def draw_grid(columns: dict[str, list[Panel]], path: Path) -> None:
    """Write a PNG with one titled column for each list of images; after 4 rows they go on to the right.

    Small images are enlarged by a whole factor without smoothing, so that every pixel stays visible.
    """
    num_rows = len(next(iter(columns.values())))
    num_blocks = -(-num_rows // ROWS)
    rows = min(num_rows, ROWS)
    side = _enlarged(next(iter(columns.values()))[0]).width
    step = side + GAP_PX
    block = len(columns) * step - GAP_PX
    width = 2 * MARGIN_PX + num_blocks * block + (num_blocks - 1) * 2 * MARGIN_PX
    height = 2 * MARGIN_PX + TITLE_PX + rows * step - GAP_PX
    grid = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(grid)
    for column, (title, panels) in enumerate(columns.items()):
        for row, panel in enumerate(panels):
            left = MARGIN_PX + (row // rows) * (block + 2 * MARGIN_PX) + column * step
            if row % rows == 0:
                centre = (left + side / 2, MARGIN_PX + TITLE_PX / 2 - GAP_PX)
                pen.text(centre, title, INK, font=_font(), anchor="mm")
            grid.paste(_enlarged(panel), (left, MARGIN_PX + TITLE_PX + (row % rows) * step))
    grid.save(path)


def _hidden_pixels(
    images: UInt8[Tensor, "B H W 3"], ids_keep: Int[Tensor, "B K"], num_patches: int
) -> Bool[Tensor, "B H W 1"]:
    """True where a patch is masked."""
    side = isqrt(num_patches)
    hidden = torch.ones(len(ids_keep), num_patches).scatter(1, ids_keep.long(), 0)
    enlarged = F.interpolate(hidden.view(-1, 1, side, side), images.shape[1:3])
    return enlarged.movedim(1, -1).bool()


def _paint_gray(
    images: UInt8[Tensor, "B H W 3"], hidden: Bool[Tensor, "B H W 1"]
) -> UInt8[Tensor, "B H W 3"]:
    return images.masked_fill(hidden, GRAY)


def load_square(path: Path, size: int) -> UInt8[Tensor, "S S 3"]:
    """An image file, turned as its EXIF says, cropped to a square around its middle and resized.

    Raises:
        CmaeError: There is no such file, or it is no image that can be read.
    """
    if not path.is_file():
        raise CmaeError(f"{path}: there is no such file")
    try:
        image = ImageOps.fit(decode_any(path.read_bytes(), turn=True), (size, size))
    except BadImageError as error:
        raise CmaeError(f"{path}: {error}") from error
    return torch.from_numpy(np.array(image))


def _enlarged(panel: Panel) -> Image.Image:
    image = Image.fromarray(panel)
    factor = max(1, round(PANEL_PX / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)
