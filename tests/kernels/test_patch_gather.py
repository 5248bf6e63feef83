"""Patch rows against slicing by hand and against torch's unfold."""

from __future__ import annotations

import pytest
import torch

from cmae.kernels.patch_gather import patch_gather

CONSTANTS = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def bytes_images(batch: int = 3, height: int = 12, width: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_of_bytes_are_normalised_pixels_in_row_column_channel_order(ids_dtype):
    images = bytes_images()
    ids = torch.tensor([[0, 14], [7, 3], [5, 5]], dtype=ids_dtype)  # 3 x 5 patches of 4 px
    rows = patch_gather(images, ids, patch_size=4, **CONSTANTS)
    assert rows.shape == (3, 2, 48)
    assert rows.dtype == torch.float32
    for b in range(3):
        for k in range(2):
            top, left = int(ids[b, k]) // 5 * 4, int(ids[b, k]) % 5 * 4
            pixels = images[b, top : top + 4, left : left + 4].double()
            expected = (pixels - torch.tensor(CONSTANTS["mean"])) / torch.tensor(CONSTANTS["std"])
            torch.testing.assert_close(rows[b, k].double(), expected.flatten(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_of_floats_are_copies_in_the_same_order_as_those_of_bytes(dtype):
    images = bytes_images()
    floats = images.permute(0, 3, 1, 2).to(dtype)
    ids = torch.arange(15).expand(3, -1)
    rows = patch_gather(floats, ids, patch_size=4, **CONSTANTS)
    unit = patch_gather(images, ids, patch_size=4, mean=(0, 0, 0), std=(1, 1, 1))
    assert rows.dtype == dtype
    assert torch.equal(rows, unit.to(dtype))


def test_rows_times_a_permuted_conv_weight_are_the_convolution():
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    rows = patch_gather(images, torch.arange(9).expand(2, -1), patch_size=4, **CONSTANTS)
    product = rows @ weight.permute(0, 2, 3, 1).flatten(1).T
    expected = torch.nn.functional.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(product, expected)


def test_strided_views_give_the_same_rows():
    images = bytes_images(height=20, width=20)
    crop = images[:, 3:15, 5:17]
    ids = torch.arange(9).expand(3, -1)
    torch.testing.assert_close(
        patch_gather(crop, ids, patch_size=4, **CONSTANTS),
        patch_gather(crop.contiguous(), ids, patch_size=4, **CONSTANTS),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    ("images", "ids", "patch_size", "named"),
    [
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), torch.zeros(2, 1).int(), 4, "images"),
        (torch.zeros(2, 8, 8, 3), torch.zeros(2, 1).int(), 4, "images"),
        (torch.zeros(2, 3, 8, 8).int(), torch.zeros(2, 1).int(), 4, "images"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1).int(), 3, "patch_size=3"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, 1).int(), 4, "ids"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1), 4, "ids"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2).int(), 4, "ids"),
    ],
)
def test_bad_arguments_are_named(images, ids, patch_size, named):
    with pytest.raises(ValueError, match=named):
        patch_gather(images, ids, patch_size=patch_size, **CONSTANTS)


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="backend='triton'"):
        patch_gather(
            bytes_images(), torch.zeros(3, 1).int(), patch_size=4, backend="triton", **CONSTANTS
        )
