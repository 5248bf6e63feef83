"""Masked pixel loss against its formula in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmae.kernels.masked_mse import masked_mse

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
ARGUMENTS = {"patch_size": 4, "mean": MEAN, "std": STD}
IDS = torch.tensor([[0, 5, 8], [2, 3, 7]], dtype=torch.int32)


def images_and_pred(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randn(2, 3, 48, dtype=torch.float64, generator=generator)


def numpy_loss(images: torch.Tensor, pred: torch.Tensor, norm_pix: bool) -> float:
    pixels = (images.numpy().astype(np.float64) - MEAN) / STD
    errors = []
    for b in range(2):
        for m, patch in enumerate(IDS[b].tolist()):
            top, left = patch // 3 * 4, patch % 3 * 4
            target = pixels[b, top : top + 4, left : left + 4].reshape(-1)
            if norm_pix:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(np.mean((pred[b, m].numpy() - target) ** 2))
    return float(np.mean(errors))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
def test_loss_equals_the_formula(norm_pix, dtype, tolerance):
    images, pred = images_and_pred()
    loss = masked_mse(pred.to(dtype), images, IDS, norm_pix=norm_pix, **ARGUMENTS)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(numpy_loss(images, pred, norm_pix), rel=tolerance)


def test_float_images_give_the_loss_of_their_bytes():
    images, pred = images_and_pred()
    floats = ((images.double() - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    expected = masked_mse(pred, images, IDS, **ARGUMENTS)
    torch.testing.assert_close(
        masked_mse(pred, floats, IDS, **ARGUMENTS), expected, rtol=1e-7, atol=0
    )


def test_a_patch_without_contrast_gives_a_finite_loss():
    images = torch.full((2, 12, 12, 3), 200, dtype=torch.uint8)
    flat = masked_mse(
        torch.zeros(2, 3, 48), images, IDS, patch_size=4, mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert flat == 0


def test_gradient_is_two_differences_over_the_number_of_values():
    images, pred = images_and_pred()
    pred.requires_grad_()
    masked_mse(pred, images, IDS, **ARGUMENTS).backward()
    loss_of = torch.func.grad(lambda p: masked_mse(p, images, IDS, **ARGUMENTS))
    at_zero = loss_of(torch.zeros_like(pred))  # -2 target / n
    torch.testing.assert_close(pred.grad, 2 * pred.detach() / pred.numel() + at_zero)


@pytest.mark.parametrize(
    ("pred", "named"),
    [
        (torch.zeros(2, 4, 48), "pred"),
        (torch.zeros(2, 3, 47), "pred"),
        (torch.zeros(2, 3, 48).int(), "pred"),
    ],
)
def test_bad_predictions_are_named(pred, named):
    with pytest.raises(ValueError, match=named):
        masked_mse(pred, images_and_pred()[0], IDS, **ARGUMENTS)


def test_bad_ids_are_named():
    with pytest.raises(ValueError, match="ids_mask"):
        masked_mse(torch.zeros(2, 3, 48), images_and_pred()[0], IDS[:1], **ARGUMENTS)
