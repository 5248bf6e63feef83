"""Images as the kernels read them: normalisation constants, patches of uint8 or float pixels, checks."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, arange, cat, float32, is_floating_point, uint8

from cmae.kernels.backend import jit, tl

Images = UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"]

Triple = tuple[float, float, float]


def raw_rows(images: Images, ids: Int[Tensor, "B K"], patch_size: int) -> Shaped[Tensor, "B K row"]:
    """The chosen patches in (py, px, channel) order, dtype and values of `images`."""
    height, width = image_hw(images)
    grid_h, grid_w = height // patch_size, width // patch_size
    ids = ids.long()
    sample = arange(ids.shape[0], device=ids.device)[:, None]
    if images.dtype == uint8:
        blocks = images.reshape(-1, grid_h, patch_size, grid_w, patch_size * 3)
        return blocks[sample, ids // grid_w, :, ids % grid_w].flatten(2)
    blocks = images.reshape(-1, 3, grid_h, patch_size, grid_w, patch_size)
    patches = blocks[sample, :, ids // grid_w, :, ids % grid_w]  # (B, K, 3, P, P)
    return patches.permute(0, 1, 3, 4, 2).flatten(2)


def normalise_rows(
    rows: Float[Tensor, "B K row"], mean: Triple, std: Triple
) -> Float[Tensor, "B K row"]:
    """(x - mean) / std per channel, for rows whose innermost axis is the channel."""
    # new_full writes the constants on the device; a tensor made from a Python list would be copied
    # from the host, which waits for the stream.
    shift = cat([rows.new_full((1,), value) for value in mean])
    scale = cat([rows.new_full((1,), value) for value in std])
    normalised: Tensor = (rows.unflatten(-1, (-1, 3)) - shift) / scale
    return normalised.flatten(-2)


def image_hw(images: Images) -> tuple[int, int]:
    """Height and width in pixels of NHWC uint8 or NCHW float images."""
    height, width = images.shape[1:3] if images.dtype == uint8 else images.shape[2:4]
    return height, width


def check_patches(images: Tensor, ids: Tensor, patch_size: int, *, ids_name: str) -> None:
    """Raise a ValueError that names the argument whose dtype or shape does not fit."""
    is_bytes = images.dtype == uint8
    if not is_bytes and not is_floating_point(images):
        raise ValueError(
            f"images has dtype {images.dtype}; expected uint8 (B, H, W, 3) or normalised "
            "floats (B, 3, H, W)."
        )
    channels = -1 if is_bytes else 1
    if images.ndim != 4 or images.shape[channels] != 3:
        layout = "(B, H, W, 3)" if is_bytes else "(B, 3, H, W)"
        raise ValueError(
            f"images has shape {tuple(images.shape)}; {images.dtype} images must be {layout}."
        )
    height, width = image_hw(images)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size={patch_size} does not divide images of {height}x{width} px; choose a "
            "divisor or resize the images."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.ndim != 2 or len(ids) != len(images):
        raise ValueError(
            f"{ids_name} has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected integers "
            f"({len(images)}, K), one row per image."
        )


KERNEL_DTYPES = (torch.float16, torch.bfloat16, float32)


def unsupported_images(images: Tensor, ids: Tensor, *, ids_name: str) -> str | None:
    """What the kernels cannot do with these images or ids; None if they can."""
    if images.dtype != uint8 and images.dtype not in KERNEL_DTYPES:
        return f"images has dtype {images.dtype}; use uint8, 16 or 32 bit or backend='torch'."
    if ids.dtype not in (torch.int32, torch.int64):
        return f"{ids_name} has dtype {ids.dtype}; use int32, int64 or backend='torch'."
    if ids.device != images.device:
        return f"{ids_name} is on {ids.device} and images on {images.device}; move one of them."
    return None


@jit()
def load_pixels(  # type: ignore[no-untyped-def]
    images,
    sample,
    patch,
    columns,
    mask,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    mean,
    scale,
    patch_size: tl.constexpr,
    is_bytes: tl.constexpr,
    is_dense: tl.constexpr,
    vector: tl.constexpr,
):
    """Float32 values `columns` of patches; `sample`, `patch` and `columns` broadcast to `mask`.

    `is_dense` says that the 3 P values of a patch's line are neighbours; a thread then reads `vector`
    of them at once. `mean` and `scale` (1 / std) are triples, used for bytes alone.
    """
    line: tl.constexpr = 3 * patch_size
    channel = columns % 3
    top = patch // grid_w * patch_size + columns // line
    if is_dense:
        left = patch % grid_w * line + columns % line
        offsets = top * stride_h + left
        if len(columns.shape) == 1:
            offsets = tl.max_contiguous(offsets, vector)
        else:
            offsets = tl.max_contiguous(offsets, [1, vector])
    else:
        left = patch % grid_w * patch_size + columns % line // 3
        offsets = top * stride_h + left * stride_w + channel * stride_c
    pixels = tl.load(images + sample * stride_b + offsets, mask=mask, other=0).to(tl.float32)
    if is_bytes:
        centre = tl.where(channel == 0, mean[0], tl.where(channel == 1, mean[1], mean[2]))
        factor = tl.where(channel == 0, scale[0], tl.where(channel == 1, scale[1], scale[2]))
        pixels = (pixels - centre) * factor
    return pixels


def kernel_geometry(images: Tensor, ids: Tensor, patch_size: int) -> tuple[int, ...]:
    """Patches an image, patches a line, strides of ids (b, k) and of images (b, c, h, w)."""
    height, width = image_hw(images)
    grid_h, grid_w = height // patch_size, width // patch_size
    order = (0, 3, 1, 2) if images.dtype == uint8 else (0, 1, 2, 3)
    strides = [images.stride(axis) for axis in order]
    return grid_h * grid_w, grid_w, *ids.stride(), *strides


def vector_width(patch_size: int, dtype: torch.dtype) -> int:
    """Neighbouring pixels for one thread: as many as fill 128 bits of `dtype`, if they divide a line.

    Wider loads of bytes are possible, but a thread would then hold more than it can write at once, and
    all values would pass through shared memory to change hands.
    """
    return math.gcd(3 * patch_size, 16 // dtype.itemsize)


def is_dense(images: Tensor) -> bool:
    """Whether the pixels of a line are neighbouring values in (x, channel) order."""
    channel, column = (3, 2) if images.dtype == uint8 else (1, 3)
    return images.stride(channel) == 1 and images.stride(column) == 3
