"""Mean squared error between predicted and true pixels of the masked patches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmae.kernels.backend import Backend, check_backend
from cmae.kernels.patch_gather import Images, Triple, check_patches, normalise_rows, raw_rows


def masked_mse(
    pred: Float[Tensor, "B M row"],
    images: Images,
    ids_mask: Int[Tensor, "B M"],
    *,
    patch_size: int,
    mean: Triple,
    std: Triple,
    norm_pix: bool = True,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    """Mean over masked patches and their P*P*3 values of (pred - target)^2 (MAE, section 3).

    Args:
        pred: predictions for the masked patches only, in the order of `ids_mask`.
        images: uint8 NHWC, or NCHW floats that are normalised already.
        ids_mask: numbers of the masked patches.
        patch_size: P, pixels.
        mean: per channel, in units of 0..255; used for uint8 images only.
        std: as `mean`.
        norm_pix: the target of a patch is (x - mean) / sqrt(var + eps) with the patch's own mean
            and unbiased variance over all P*P*3 values; else the normalised pixels.
        eps: added to the variance, in normalised units.
        backend: which implementation; see `cmae.kernels.backend`.

    Returns:
        float32 scalar, computed in float32 whatever the dtype of `pred` (float64 stays float64).

    Raises:
        ValueError: shape or dtype of an argument is wrong.
    """
    check_backend("masked_mse", backend)
    check_patches(images, ids_mask, patch_size, ids_name="ids_mask")
    expected = (*ids_mask.shape, patch_size * patch_size * 3)
    if tuple(pred.shape) != expected or not pred.is_floating_point():
        raise ValueError(
            f"pred has shape {tuple(pred.shape)} and dtype {pred.dtype}; expected floats "
            f"{expected}: one row of patch_size^2*3 values per entry of ids_mask."
        )
    return masked_mse_reference(
        pred,
        images,
        ids_mask,
        patch_size=patch_size,
        mean=mean,
        std=std,
        norm_pix=norm_pix,
        eps=eps,
    )


def masked_mse_reference(
    pred: Float[Tensor, "B M row"],
    images: Images,
    ids_mask: Int[Tensor, "B M"],
    *,
    patch_size: int,
    mean: Triple,
    std: Triple,
    norm_pix: bool = True,
    eps: float = 1e-6,
) -> Float[Tensor, ""]:
    """`masked_mse` in plain torch."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    with torch.no_grad():
        target = raw_rows(images, ids_mask, patch_size).to(dtype)
        if images.dtype == torch.uint8:
            target = normalise_rows(target, mean, std)
        if norm_pix:
            centre = target.mean(dim=-1, keepdim=True)
            variance = target.var(dim=-1, keepdim=True, correction=1)
            target = (target - centre) / (variance + eps).sqrt()
    return (pred.to(dtype) - target).square().mean()
