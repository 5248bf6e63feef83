"""What the image grids show is what happened: hidden patches are gray, visible ones the original's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmae.model import CMAE, ModelConfig, build_model, draw_mask
from cmae.pipeline import Batch, LoaderState
from cmae.train.commands.look.reconstruct import reconstruct
from cmae.train.monitor.images import (
    GAP_PX,
    GRAY,
    MARGIN_PX,
    TITLE_PX,
    draw_grid,
    draw_reconstructions,
    first_batch_grid,
)
from cmae.train.monitor.plots import loss_plot

SIZE, PATCH, ENLARGED = 16, 4, 144
CONFIG = ModelConfig(
    img_size=SIZE,
    patch_size=PATCH,
    embed_dim=16,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    feature_decoder_depth=1,
    proj_hidden_dim=8,
    proj_dim=4,
    mask_unit=1,
)


@pytest.fixture(scope="module")
def model() -> CMAE:
    return build_model(CONFIG, seed=0)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    online, target = (
        torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    )
    index = torch.arange(3)
    ids_keep, ids_mask = draw_mask(CONFIG, index, seed=0, epoch=0)
    state = LoaderState(seed=0, epoch=0, offset=3, digest="")
    return Batch(online, target, ids_keep, ids_mask, index, index, 0, state)


def panel(path: Path, row: int, column: int) -> np.ndarray:
    """The image in a grid, at its own size again."""
    grid = np.asarray(Image.open(path))
    left = MARGIN_PX + column * (ENLARGED + GAP_PX)
    top = MARGIN_PX + TITLE_PX + row * (ENLARGED + GAP_PX)
    return grid[top : top + ENLARGED : ENLARGED // SIZE, left : left + ENLARGED : ENLARGED // SIZE]


def is_hidden(batch: Batch, row: int) -> np.ndarray:
    """(SIZE, SIZE, 1), patch by patch."""
    hidden = np.zeros((SIZE, SIZE, 1), bool)
    for patch in batch.ids_mask[row].tolist():
        y, x = divmod(patch, SIZE // PATCH)
        hidden[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH] = True
    return hidden


def test_reconstruction_keeps_visible_pixels_and_paints_hidden_ones(
    model: CMAE, batch: Batch, tmp_path: Path
) -> None:
    path = tmp_path / "r.png"
    draw_reconstructions(model.train(), batch.online, batch.masks[0], path)
    assert model.training
    for row in range(3):
        online, hidden = batch.online[row].numpy(), is_hidden(batch, row)
        original, masked, painted = (panel(path, row, column) for column in range(3))
        np.testing.assert_array_equal(original, online)
        np.testing.assert_array_equal(masked, np.where(hidden, GRAY, online))
        where = np.broadcast_to(hidden, online.shape)
        np.testing.assert_array_equal(painted[~where], online[~where])
        assert (painted != online)[where].mean() > 0.9


def test_predicted_patches_have_the_level_of_the_true_ones(
    model: CMAE, batch: Batch, tmp_path: Path
) -> None:
    levels = torch.full_like(batch.online, 40)
    levels[:, :, SIZE // 2 :] = 200
    levels += torch.randint_like(levels, 0, 4)
    flat = Batch(levels, None, *(getattr(batch, name) for name in list(vars(batch))[2:]))
    draw_reconstructions(model, flat.online, flat.masks[0], tmp_path / "r.png")
    painted, where = panel(tmp_path / "r.png", 0, 2).astype(int), is_hidden(flat, 0)[..., 0]
    left = np.arange(SIZE) < SIZE // 2
    assert abs(painted[where & left].mean() - 41) < 3
    assert abs(painted[where & ~left].mean() - 201) < 3


@pytest.mark.parametrize("with_target", [True, False])
def test_first_batch_shows_views_and_mask(batch: Batch, tmp_path: Path, with_target: bool) -> None:
    path = tmp_path / "b.png"
    if not with_target:
        batch = Batch(batch.online, None, *(getattr(batch, n) for n in list(vars(batch))[2:]))
    first_batch_grid(batch, path)
    online = batch.online[1].numpy()
    np.testing.assert_array_equal(panel(path, 1, 0), online)
    np.testing.assert_array_equal(panel(path, 1, 1), np.where(is_hidden(batch, 1), GRAY, online))
    if batch.target is not None:
        np.testing.assert_array_equal(panel(path, 1, 2), batch.target[1].numpy())
    columns = 3 if with_target else 2
    assert Image.open(path).width == 2 * MARGIN_PX + columns * (ENLARGED + GAP_PX) - GAP_PX


def test_long_grids_go_on_to_the_right(tmp_path: Path) -> None:
    images = [np.full((SIZE, SIZE, 3), 10 * i, np.uint8) for i in range(9)]
    draw_grid({"a": images}, tmp_path / "s.png")
    grid = np.asarray(Image.open(tmp_path / "s.png"))
    assert {10 * i for i in range(9)} <= set(np.unique(grid[MARGIN_PX + TITLE_PX :]).tolist())


def test_reconstruct_command_takes_image_files(
    model: CMAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmae.train.commands.look.reconstruct.load_model", lambda _: model)
    wide = np.zeros((30, 60, 3), np.uint8)
    wide[:, 15:45] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    out = tmp_path / "new" / "r.png"
    assert reconstruct(tmp_path / "x.pt", [tmp_path / "a.png"], out) == 0
    assert (panel(out, 0, 0)[:, 2:-2] == 200).all()  # the filter reaches beyond the square
    with pytest.raises(ValueError, match=r"b\.png"):
        reconstruct(tmp_path / "x.pt", [tmp_path / "b.png"], out)


def test_a_model_without_pixel_decoder_is_refused(batch: Batch, tmp_path: Path) -> None:
    blind = build_model(replace(CONFIG, reconstruction_weight=0.0), seed=0)
    with pytest.raises(ValueError, match="reconstruction_weight=0"):
        draw_reconstructions(blind, batch.online, batch.masks[0], tmp_path / "r.png")


def records(**constant: float) -> str:
    lines = [
        {"step": 10 * i, "total": 2 / i, "reconstruction": 1 / i, "lr": 0.1, **constant}
        for i in range(1, 6)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_loss_plot_leaves_out_what_the_model_does_not_have(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    heights = []
    # The second is of a run that began when the term had another name.
    for terms in ({"contrastive_raw": 0.0}, {"info_nce": 3.0}):
        metrics.write_text(records(**terms, images_per_s=100.0, data_wait_pct=5.0))
        loss_plot(metrics, tmp_path / "loss.png")
        heights.append(np.asarray(Image.open(tmp_path / "loss.png").convert("L")))
    assert heights[0].shape == heights[1].shape
    middle = heights[0].shape[0] // 2 + 5
    inks = [int((image[middle:, image.shape[1] // 3 + 40 :] < 250).sum()) for image in heights]
    assert inks[1] > inks[0]


def test_no_empty_panel_is_left(tmp_path: Path) -> None:
    """Five panels in rows of three leave the last place of the second row white."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(records(grad_norm=1.0, images_per_s=100.0, data_wait_pct=5.0))
    loss_plot(metrics, tmp_path / "loss.png")
    image = np.asarray(Image.open(tmp_path / "loss.png").convert("L"))
    height, width = image.shape
    assert (image[height // 2 + 5 :, 2 * width // 3 + 60 :] == 255).all()
    assert (image[: height // 2 - 5, 2 * width // 3 + 60 :] < 250).any()


def test_loss_plot_without_records_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*log_every"):
        loss_plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
