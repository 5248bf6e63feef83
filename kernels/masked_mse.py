"""Mean squared error between predicted and true pixels of the masked patches."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmae.kernels.backend import Backend, jit, on_device, refuse_backward, tl, use_triton
from cmae.kernels.images import (
    KERNEL_DTYPES,
    Images,
    Triple,
    check_patches,
    is_dense,
    kernel_geometry,
    load_pixels,
    normalise_rows,
    raw_rows,
    unsupported_images,
    vector_width,
)

_MAX_ROW = 4096  # values of a patch that one program holds in registers


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
        pred: Predictions for the masked patches only, in the order of `ids_mask`.
        images: uint8 NHWC, or NCHW floats that are normalised already.
        ids_mask: Numbers of the masked patches.
        patch_size: Side P of a patch, px.
        mean: Mean per channel, in units of 0..255; used for uint8 images only.
        std: Standard deviation per channel, like `mean`.
        norm_pix: Whether the target of a patch is (x - mean) / sqrt(var + eps) with the patch's own mean
            and unbiased variance over all P*P*3 values; else the normalised pixels.
        eps: Number added to the variance, in normalised units.
        backend: Implementation; see `cmae.kernels.backend`.

    Returns:
        float32 scalar, computed in float32 whatever the dtype of `pred` (float64 stays float64).

    Raises:
        ValueError: Shape or dtype of an argument is wrong.
    """
    check_patches(images, ids_mask, patch_size, ids_name="ids_mask")
    expected = (*ids_mask.shape, patch_size * patch_size * 3)
    if tuple(pred.shape) != expected or not pred.is_floating_point():
        raise ValueError(
            f"pred has shape {tuple(pred.shape)} and dtype {pred.dtype}; expected floats "
            f"{expected}: one row of patch_size^2*3 values per entry of ids_mask."
        )
    unsupported = _unsupported(pred, images, ids_mask, patch_size)
    if use_triton("masked_mse", backend, pred.device, unsupported=unsupported):
        loss: Tensor = torch.ops.cmae.masked_mse(
            pred, images, ids_mask, patch_size, mean, std, norm_pix, eps
        )
        return loss
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


def _unsupported(pred: Tensor, images: Tensor, ids_mask: Tensor, patch_size: int) -> str | None:
    """What the kernel cannot do with these arguments; None if it can."""
    if pred.dtype not in KERNEL_DTYPES:
        return f"pred has dtype {pred.dtype}; use 16 or 32 bit or backend='torch'."
    if pred.device != images.device:
        return f"pred is on {pred.device} and images on {images.device}; move one of them."
    if pred.shape[2] > _MAX_ROW:
        return f"patch_size={patch_size} has more than {_MAX_ROW} values; use backend='torch'."
    return unsupported_images(images, ids_mask, ids_name="ids_mask")


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


@jit()
def _mse_kernel(  # type: ignore[no-untyped-def]
    pred,
    images,
    ids,
    grad_loss,
    out,
    num_rows,
    num_masked,
    scale,
    eps,
    num_patches,
    grid_w,
    ids_stride_b,
    ids_stride_k,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    pred_stride_b,
    pred_stride_m,
    pred_stride_r,
    mean_r,
    mean_g,
    mean_b,
    scale_r,
    scale_g,
    scale_b,
    patch_size: tl.constexpr,
    is_bytes: tl.constexpr,
    is_dense: tl.constexpr,
    vector: tl.constexpr,
    norm_pix: tl.constexpr,
    is_backward: tl.constexpr,
    pred_is_contiguous: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """A warp handles `block_rows` patches: `scale` * squared error each, or the gradient of `pred`.

    Both directions make the target anew from the pixels. The variance is that of the centred values,
    which are in registers; the gradient is multiplied by that of the loss before it is rounded. What
    depends on the column alone is computed once for all rows of the loop.
    """
    row_dim: tl.constexpr = 3 * patch_size * patch_size
    columns = tl.arange(0, block)
    inside = columns < row_dim
    for step in range(block_rows):
        row = tl.program_id(0) * block_rows + step
        is_row = row < num_rows
        sample, place = (row // num_masked).to(tl.int64), row % num_masked
        places = ids + sample * ids_stride_b + place * ids_stride_k
        patch = tl.load(places, mask=is_row, other=-1).to(tl.int32)
        known = (patch >= 0) & (patch < num_patches)
        if pred_is_contiguous:
            values = pred + row.to(tl.int64) * row_dim + columns
        else:
            values = pred + sample * pred_stride_b + place * pred_stride_m + columns * pred_stride_r
        predicted = tl.load(values, mask=inside & is_row, other=0).to(tl.float32)
        target = load_pixels(
            images,
            sample,
            patch,
            columns,
            inside & known,
            grid_w,
            stride_b,
            stride_c,
            stride_h,
            stride_w,
            (mean_r, mean_g, mean_b),
            (scale_r, scale_g, scale_b),
            patch_size,
            is_bytes,
            is_dense,
            vector,
        )
        if norm_pix:
            centred = target - tl.sum(tl.where(inside, target, 0)) / row_dim
            variance = tl.sum(tl.where(inside, centred * centred, 0)) / (row_dim - 1)
            target = centred / tl.sqrt_rn(variance + eps)
        error = predicted - target
        if is_backward:
            factor = tl.where(known, tl.load(grad_loss) * scale, float("nan"))
            places = out + row.to(tl.int64) * row_dim + columns
            tl.store(places, (error * factor).to(out.dtype.element_ty), mask=inside & is_row)
        else:
            squares = tl.sum(tl.where(inside, error * error, 0))
            tl.store(out + row, tl.where(known, squares * scale, float("nan")), mask=is_row)


def _launch(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    mean: list[float],
    std: list[float],
    norm_pix: bool,
    eps: float,
    *,
    grad_loss: Tensor | None,
) -> Tensor:
    """Mean squared error of each row, or with `grad_loss` the gradient of `pred`."""
    batch, num_masked, row_dim = pred.shape
    if grad_loss is None:
        out = pred.new_empty(batch * num_masked, dtype=torch.float32)
        scale = 1 / row_dim
    else:
        out = torch.empty_like(pred, memory_format=torch.contiguous_format)
        scale = 2 / max(pred.numel(), 1)
    if out.numel() == 0:
        return out
    num_rows, block_rows, block = batch * num_masked, 4, 1 << (row_dim - 1).bit_length()
    with on_device(pred):
        _mse_kernel[(-(-num_rows // block_rows),)](
            pred,
            images,
            ids,
            grad_loss,
            out,
            num_rows,
            num_masked,
            scale,
            eps,
            *kernel_geometry(images, ids, patch_size),
            *pred.stride(),
            *mean,
            *(1 / value for value in std),
            patch_size=patch_size,
            is_bytes=images.dtype == torch.uint8,
            is_dense=is_dense(images),
            vector=vector_width(patch_size, pred.dtype),
            norm_pix=norm_pix,
            is_backward=grad_loss is not None,
            pred_is_contiguous=pred.is_contiguous(),
            block_rows=block_rows,
            block=block,
            num_warps=max(1, block // 1024),  # one warp, 32 values a thread: no barrier in the sums
        )
    return out


def _forward(pred: Tensor, *arguments: Any) -> Tensor:
    # The mean over rows adds in an order that the shape alone decides.
    return _launch(pred, *arguments, grad_loss=None).mean()


def _backward(grad_loss: Tensor, pred: Tensor, *arguments: Any) -> Tensor:
    return _launch(pred, *arguments, grad_loss=grad_loss)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _grad_pred(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    grad = torch.ops.cmae.masked_mse_backward(grad_loss, *ctx.saved_tensors, *ctx.arguments)
    return grad, *[None] * 7


_ARGUMENTS = (
    "Tensor pred, Tensor images, Tensor ids_mask, int patch_size, float[] mean, float[] std, bool norm_pix, "
    "float eps"
)
torch.library.define("cmae::masked_mse", f"({_ARGUMENTS}) -> Tensor")
torch.library.impl("cmae::masked_mse", ("cpu", "cuda"), _forward)
torch.library.register_fake(
    "cmae::masked_mse", lambda pred, *_: pred.new_empty((), dtype=torch.float32)
)
torch.library.register_autograd("cmae::masked_mse", _grad_pred, setup_context=_setup_context)
torch.library.define("cmae::masked_mse_backward", f"(Tensor grad_loss, {_ARGUMENTS}) -> Tensor")
torch.library.impl("cmae::masked_mse_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake(
    "cmae::masked_mse_backward",
    lambda _, pred, *__: torch.empty_like(pred, memory_format=torch.contiguous_format),
)
torch.library.register_autograd("cmae::masked_mse_backward", refuse_backward)
