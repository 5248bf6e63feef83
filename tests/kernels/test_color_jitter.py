"""The colour op's reference against the loader's chain, torchvision and Pillow; its launches and bytes."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipeline_data import photo
from torch import Tensor
from torchvision.transforms import functional as tv
from torchvision.transforms.v2 import functional as v2

from cmae.kernels.color_jitter import PARAMS, color_jitter, color_jitter_reference
from cmae.pipeline.views.color_batch import color_chain
from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.params import JITTER_ORDERS, ViewParams, draw_view_params
from cmae.pipeline.views.reference import reference_color

module = import_module("cmae.kernels.color_jitter")
N = 24


def photos(size: int = 56) -> Tensor:
    return torch.from_numpy(np.stack([photo(size, size, seed=i) for i in range(N)]))


def drawn(batch: int = N, **changes: object) -> ViewParams:
    height, width = np.full(batch, 300), np.full(batch, 400)
    params = draw_view_params(
        ViewConfig(),
        seed=0,
        epoch=0,
        sample_id=np.arange(batch),
        height=height,
        width=width,
    )
    return replace(params, **changes)


def op_params(params: ViewParams) -> Tensor:
    """How a loader fills the op: the last columns of its one parameter matrix."""
    return torch.from_numpy(params.matrix())[:, ViewParams.columns()["jitter"] :]


def only(**columns: float) -> Tensor:
    """One row with jitter, neutral but for the named columns."""
    neutral = {"jitter": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    return torch.tensor([[({**neutral, **columns}).get(name, 0.0) for name in PARAMS]])


def test_columns_are_those_of_the_loaders_matrix():
    params = drawn()
    columns = dict(zip(PARAMS, op_params(params).unbind(1), strict=True))
    assert columns["jitter"].bool().tolist() == params.jitter.tolist()
    names = ("brightness", "contrast", "saturation", "hue")
    for index, name in enumerate(names):
        assert columns[name].tolist() == params.factors[:, index].tolist()
    assert columns["order"].int().tolist() == params.order.tolist()
    assert columns["grayscale"].bool().tolist() == params.grayscale.tolist()
    assert columns["blur_sigma"].tolist() == params.blur_sigma.tolist()


def test_orders_are_numbered_as_in_the_loader():
    places = module._operations(torch.arange(24))
    assert torch.stack(places, dim=1).tolist() == JITTER_ORDERS.tolist()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_reference_is_the_loaders_chain(mode):
    params = drawn(blur_sigma=np.zeros(N, np.float32))
    made = color_jitter_reference(photos(), op_params(params), mode=mode)
    expected = color_chain(photos(), params, mode=mode)
    error = (made.int() - expected.int()).abs()
    assert error.max() <= (0 if mode == "exact" else 1)
    assert error.float().mean() < 1e-3


def test_reference_is_the_loaders_chain_with_its_blur():
    """One image at a time, where the chain's radius is the image's own."""
    pixels, params = photos(), drawn()
    made = color_jitter_reference(pixels, op_params(params))
    rows = [params.rows(slice(i, i + 1)) for i in range(N)]
    expected = torch.cat(
        [color_chain(pixels[i : i + 1], row, mode="exact") for i, row in enumerate(rows)]
    )
    error = (made.int() - expected.int()).abs()
    assert error.max() <= 1
    assert error.float().mean() < 1e-3


def test_whole_chain_is_torchvisions():
    pixels, params = photos(), drawn()
    made = color_jitter(pixels, op_params(params)).numpy().astype(int)
    expected = np.stack([reference_color(pixels[i].numpy(), params, row=i) for i in range(N)])
    error = np.abs(made - expected)
    assert error.mean() < 0.01
    assert np.quantile(error, 0.9999) <= 1
    assert error.max() <= 4  # one pixel that rounds otherwise before a strong contrast


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_operation_is_torchvisions_and_pillows(name, factor):
    pixels = photos()[:1]
    made = color_jitter(pixels, only(**{name: factor}))[0].int()
    planes, factor = pixels[0].permute(2, 0, 1), float(np.float32(factor))
    # v2 blends with fused products: one pixel in 300 rounds otherwise there.
    for functional, most in ((tv, 1e-3), (v2, 0.01)):
        expected = getattr(functional, f"adjust_{name}")(planes, factor).permute(1, 2, 0)
        error = (made - expected.int()).abs()
        assert error.max() <= 1
        assert error.float().mean() < most
    enhanced = getattr(tv, f"adjust_{name}")(Image.fromarray(pixels[0].numpy()), factor)
    error = (made - torch.from_numpy(np.array(enhanced)).int()).abs()
    assert error.max() <= 2  # Pillow rounds its greys to nearest
    assert error.float().mean() < 0.7


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.1, 0.3])
def test_hue_is_torchvisions_on_a_grid_of_colours(turn):
    level = torch.arange(17) * 255 // 16
    grid = torch.cartesian_prod(level, level, level).to(torch.uint8).view(1, 17, 289, 3)
    made = color_jitter(grid, only(hue=turn))[0].int()
    expected = v2.adjust_hue(grid[0].permute(2, 0, 1), float(np.float32(turn))).permute(1, 2, 0)
    error = (made - expected.int()).abs()
    assert error.max() <= 1
    assert error.float().mean() < 0.002  # exact thirds and halves round either way


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_gray_and_blur_are_torchvisions(sigma):
    pixels = photos()[:1]
    row = only(jitter=0.0, grayscale=1.0, blur_sigma=sigma)
    made = color_jitter(pixels, row)[0].int()
    expected = v2.rgb_to_grayscale(pixels[0].permute(2, 0, 1), num_output_channels=3)
    expected = v2.gaussian_blur(expected, [23, 23], [sigma, sigma]).permute(1, 2, 0)
    error = (made - expected.int()).abs()
    assert error.max() <= 1
    assert error.float().mean() < 0.05  # taps past three sigma


def test_no_value_is_read_by_the_host():
    """A read would raise on tensors without data."""
    images = torch.empty(3, 20, 24, 3, dtype=torch.uint8, device="meta")
    params = torch.empty(3, 8, device="meta")
    for mode in ("exact", "fast"):
        assert color_jitter_reference(images, params, mode=mode).shape == images.shape


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images has shape"),
        ({"images": torch.zeros(2, 8, 8, 3)}, "images has shape"),
        ({"params": torch.zeros(2, 7)}, r"expected float32 \(2, 8\)"),
        ({"params": torch.zeros(3, 8)}, r"expected float32 \(2, 8\)"),
        ({"params": torch.zeros(2, 8, device="meta")}, "params is on meta"),
        ({"mode": "none"}, "mode='none'"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "params": torch.zeros(2, 8),
    }
    with pytest.raises(ValueError, match=named):
        color_jitter(**{**arguments, **change})


# -- launches and bytes --------------------------------------------------------------------------------


def bytes_moved(params: Tensor, launches: list, size: int) -> int:
    """What the programs of the recorded launches read and write, halos included, caches left out."""
    columns = dict(zip(PARAMS, params.unbind(1), strict=True))
    *before, pixel, blur = (launch.options for launch in launches)
    image = 3 * size * size
    sums = 4 * pixel["num_blocks"]
    is_blurred = columns["blur_sigma"] > 0
    has_mean = (columns["jitter"] != 0) & (columns["contrast"] != 1)
    total = len(params) * 2 * image
    if before:
        total += int(has_mean.sum()) * (image + sums + pixel["num_blocks"] * sums)
    for sigma in columns["blur_sigma"][is_blurred].tolist():
        radius = min(int(np.ceil(3 * sigma)), blur["max_radius"])
        rows = halo_sum(size, blur["tile"], radius)
        total += image + 3 * rows * halo_sum(size, blur["tile"], blur["tile"] // 2)
    return total


def halo_sum(size: int, tile: int, halo: int) -> int:
    """Places that tiles of an axis read, each with a halo, cut at the borders."""
    starts = range(0, size, tile)
    return sum(min(start + tile + halo, size) - max(start - halo, 0) for start in starts)


@pytest.mark.parametrize(("mode", "most"), [("exact", 3), ("fast", 2)])
@pytest.mark.parametrize("batch", [128, 512])
def test_three_launches_and_less_than_three_times_the_floor(monkeypatch, mode, most, batch):
    pytest.importorskip("triton")
    from support.kernel_builds import record_launches

    params = op_params(drawn(batch))
    images = torch.empty(batch, 224, 224, 3, dtype=torch.uint8)
    launches = record_launches(
        monkeypatch, module, lambda: module._launch(images, params, mode == "exact")
    )
    assert len(launches) == most
    floor = 2 * images.numel()
    moved = bytes_moved(params, launches, 224)
    assert moved <= most * floor
    print(f"{mode} {batch}: {moved / 1e6:.1f} MB, {moved / floor:.2f} x the floor")
    heaviest = params.clone()
    heaviest[:, [0, 2, 7]] = torch.tensor([1.0, 0.6, 2.0])
    assert bytes_moved(heaviest, launches, 224) <= 3.5 * floor
