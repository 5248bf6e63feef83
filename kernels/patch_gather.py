"""Cut the chosen patches out of a batch of images as normalised rows.

Only the patches that a network will see are read, so pixels stay uint8 until they are needed and
the patch embedding becomes one matrix product over visible patches.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, float32, is_floating_point, uint8

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


def patch_gather(
    images: Images,
    ids: Int[Tensor, "B K"],
    *,
    patch_size: int,
    mean: Triple,
    std: Triple,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "B K row"]:
    """Rows of P*P*3 values in (py, px, channel) order for the patches named by `ids`.

    Args:
        images: uint8 NHWC with values 0..255, or NCHW floats that are normalised already.
        ids: Patch numbers, row by row from the top left; each in 0..H/P*W/P-1 (not checked on a
            GPU, where looking would stop the host; the kernel answers NaN to other numbers).
        patch_size: Side P of a patch, px.
        mean: Mean per channel, in units of 0..255; used for uint8 images only.
        std: Standard deviation per channel, like `mean`.
        out_dtype: Number format of the rows, rounded from float32 arithmetic. None: float32 for uint8
            images, else the dtype of `images`.
        backend: Implementation; see `cmae.kernels.backend`. The kernel has no gradient for
            float images; the reference has.

    Raises:
        ValueError: Shape or dtype of an argument is wrong.
    """
    check_patches(images, ids, patch_size, ids_name="ids")
    if out_dtype is None:
        out_dtype = float32 if images.dtype == uint8 else images.dtype
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype={out_dtype} is not a floating-point type.")
    unsupported = unsupported_images(images, ids, ids_name="ids")
    if out_dtype not in KERNEL_DTYPES:
        unsupported = f"out_dtype={out_dtype}; use float16, bfloat16, float32 or backend='torch'."
    if images.requires_grad and torch.is_grad_enabled():
        unsupported = "images requires a gradient, which the kernel has not; use backend='torch'."
    if use_triton("patch_gather", backend, images.device, unsupported=unsupported):
        rows: Tensor = torch.ops.cmae.patch_gather(images, ids, patch_size, mean, std, out_dtype)
        return rows
    return patch_gather_reference(
        images, ids, patch_size=patch_size, mean=mean, std=std, out_dtype=out_dtype
    )


def patch_gather_reference(
    images: Images,
    ids: Int[Tensor, "B K"],
    *,
    patch_size: int,
    mean: Triple,
    std: Triple,
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "B K row"]:
    """`patch_gather` in plain torch: gather first, so that only chosen pixels become floats."""
    rows = raw_rows(images, ids, patch_size)
    if not is_floating_point(rows):
        rows = normalise_rows(rows.to(float32), mean, std)
    return rows if out_dtype is None else rows.to(out_dtype)


@jit()
def _gather_kernel(  # type: ignore[no-untyped-def]
    images,
    ids,
    out,
    num_rows,
    num_keep,
    num_patches,
    grid_w,
    ids_stride_b,
    ids_stride_k,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
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
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One program writes `block_rows` rows, `block_columns` values at a time."""
    row_dim: tl.constexpr = 3 * patch_size * patch_size
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)[:, None]
    inside = rows < num_rows
    sample = (rows // num_keep).to(tl.int64)
    places = ids + sample * ids_stride_b + rows % num_keep * ids_stride_k
    patch = tl.load(places, mask=inside, other=-1).to(tl.int32)
    known = (patch >= 0) & (patch < num_patches)
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)[None, :]
    pixels = load_pixels(
        images,
        sample,
        patch,
        columns,
        known & (columns < row_dim),
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
    pixels = tl.where(known, pixels, float("nan"))
    places = out + rows.to(tl.int64) * row_dim + columns
    tl.store(places, pixels.to(out.dtype.element_ty), mask=inside & (columns < row_dim))


def _launch(
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    mean: list[float],
    std: list[float],
    out_dtype: torch.dtype,
) -> Tensor:
    out = _empty_rows(images, ids, patch_size, mean, std, out_dtype)
    if out.numel() == 0:
        return out
    num_rows, block_rows, block_columns = ids.numel(), 32, 256
    grid = (-(-num_rows // block_rows), -(-out.shape[2] // block_columns))
    with on_device(images):
        _gather_kernel[grid](
            images,
            ids,
            out,
            num_rows,
            ids.shape[1],
            *kernel_geometry(images, ids, patch_size),
            *mean,
            *(1 / value for value in std),
            patch_size=patch_size,
            is_bytes=images.dtype == uint8,
            is_dense=is_dense(images),
            vector=vector_width(patch_size, out_dtype),
            block_rows=block_rows,
            block_columns=block_columns,
            num_warps=4,
        )
    return out


def _empty_rows(
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    mean: list[float],
    std: list[float],
    out_dtype: torch.dtype,
) -> Tensor:
    return images.new_empty((*ids.shape, 3 * patch_size * patch_size), dtype=out_dtype)


torch.library.define(
    "cmae::patch_gather",
    "(Tensor images, Tensor ids, int patch_size, float[] mean, float[] std, ScalarType out_dtype) -> Tensor",
)

torch.library.impl("cmae::patch_gather", ("cpu", "cuda"), _launch)

torch.library.register_fake("cmae::patch_gather", _empty_rows)

torch.library.register_autograd("cmae::patch_gather", refuse_backward)
