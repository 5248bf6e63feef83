"""Cut the chosen patches out of a batch of images as normalised rows.

Only the patches that a network will see are read, so pixels stay uint8 until they are needed and
the patch embedding becomes one matrix product over visible patches.
"""

from __future__ import annotations

from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, arange, cat, float32, is_floating_point, uint8

from cmae.kernels.backend import Backend, check_backend

Images = UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"]
Triple = tuple[float, float, float]


def patch_gather(
    images: Images,
    ids: Int[Tensor, "B K"],
    *,
    patch_size: int,
    mean: Triple,
    std: Triple,
    backend: Backend = "auto",
) -> Float[Tensor, "B K row"]:
    """Rows of P*P*3 values in (py, px, channel) order for the patches named by `ids`.

    Args:
        images: uint8 NHWC with values 0..255, or NCHW floats that are normalised already.
        ids: patch numbers, row by row from the top left; each in 0..H/P*W/P-1 (not checked on a
            GPU, where looking would stop the host).
        patch_size: P, pixels.
        mean: per channel, in units of 0..255; used for uint8 images only.
        std: as `mean`.
        backend: which implementation; see `cmae.kernels.backend`.

    Returns:
        float32 for uint8 images, else the dtype of `images`.

    Raises:
        ValueError: shape or dtype of an argument is wrong.
    """
    check_backend("patch_gather", backend)
    check_patches(images, ids, patch_size, ids_name="ids")
    return patch_gather_reference(images, ids, patch_size=patch_size, mean=mean, std=std)


def patch_gather_reference(
    images: Images, ids: Int[Tensor, "B K"], *, patch_size: int, mean: Triple, std: Triple
) -> Float[Tensor, "B K row"]:
    """`patch_gather` in plain torch: gather first, so that only chosen pixels become floats."""
    rows = raw_rows(images, ids, patch_size)
    if is_floating_point(rows):
        return rows
    return normalise_rows(rows.to(float32), mean, std)


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
