"""Between pixels as users give them and pixels as a network wants them."""

from __future__ import annotations

import torch

from cmae.kernels.images import Images
from cmae.model.config import STANDARD_MEAN, STANDARD_STD, ModelConfig


def to_config_normalisation(images: Images, config: ModelConfig) -> Images:
    """Float images, normalised with the standard constants, in the constants of `config`.

    uint8 images pass: whoever gathers them normalises them with the constants of `config`.
    """
    standard = (STANDARD_MEAN, STANDARD_STD)
    if not images.is_floating_point() or (config.pixel_mean, config.pixel_std) == standard:
        return images
    scale, shift = renormalisation(config)
    channels = [images[:, c] * scale[c] + shift[c] for c in range(3)]
    return torch.stack(channels, dim=1)


def renormalisation(config: ModelConfig) -> tuple[list[float], list[float]]:
    """Scale and shift per channel from standard-normalised values to those of `config`."""
    constants = list(
        zip(STANDARD_MEAN, STANDARD_STD, config.pixel_mean, config.pixel_std, strict=True)
    )
    scale = [std_from / std_to for _, std_from, _, std_to in constants]
    shift = [(mean_from - mean_to) / std_to for mean_from, _, mean_to, std_to in constants]
    return scale, shift
