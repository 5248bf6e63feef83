"""Two views made image by image in Python: Pillow's geometry, Pillow's or torchvision's colours."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cmae.pipeline import ViewConfig
from cmae.train.bench.peers.contract import MEAN, STD, Pair


class PillowViews:
    """Pillow makes the geometry; the colours come from Pillow too, or from torchvision v2 on tensors."""

    def __init__(self, views: ViewConfig, *, tensor_color: bool = False) -> None:
        self.views = views
        self.tensor_color = tensor_color
        self.source_crop = v2.Compose(
            [
                v2.RandomResizedCrop(
                    views.source_crop_size,
                    scale=(views.min_area, views.max_area),
                    ratio=(views.min_aspect, views.max_aspect),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(views.hflip_prob),
            ]
        )
        sigma = (views.blur_sigma_min, views.blur_sigma_max)
        blur = v2.GaussianBlur(23, sigma) if tensor_color else self.blur
        jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
        self.color = v2.Compose(
            [
                v2.RandomApply([jitter], views.jitter_prob),
                v2.RandomGrayscale(views.grayscale_prob),
                v2.RandomApply([blur], views.blur_prob),
            ]
        )

    def blur(self, image: Image.Image) -> Image.Image:
        """Pillow's blur: torchvision's is a float convolution, several times slower on a CPU."""
        sigma = random.uniform(self.views.blur_sigma_min, self.views.blur_sigma_max)
        return image.filter(ImageFilter.GaussianBlur(sigma))

    def __call__(self, data: bytes) -> Pair:
        """Both views of a JPEG, uint8 (H, W, 3)."""
        return self.crop(self.source_crop(Image.open(io.BytesIO(data)).convert("RGB")))

    def crop(self, source_crop: Image.Image) -> Pair:
        """Both views of a source crop."""
        side, shift = self.views.img_size, self.views.target_shift
        top, left = random.randint(0, shift), random.randint(0, shift)
        online = source_crop.crop((0, 0, side, side))
        target: Any = source_crop.crop((left, top, left + side, top + side))
        if self.tensor_color:
            target = torch.from_numpy(np.array(target)).permute(2, 0, 1)
        if self.views.color != "none":
            target = self.color(target)
        if self.tensor_color:
            return _to_tensor(online), target.permute(1, 2, 0).contiguous()
        return _to_tensor(online), _to_tensor(target)


class NormalisedViews(PillowViews):
    """The authors' loader as their paper and recipe describe it: both views leave the worker as floats."""

    def crop(self, source_crop: Image.Image) -> Pair:
        """Both views of a source crop, float32 (3, H, W), mean and deviation of ImageNet taken out."""
        online, target = (
            tv.to_dtype(_chw(view), torch.float32) for view in super().crop(source_crop)
        )
        return tv.normalize(online, MEAN, STD), tv.normalize(target, MEAN, STD)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def _chw(view: torch.Tensor) -> torch.Tensor:
    return view.permute(2, 0, 1)


def describe_pillow(views: ViewConfig) -> str:
    """What Pillow's views of this configuration are."""
    colors = "" if views.color == "none" else ", torchvision jitter and blur by Pillow"
    return f"Pillow geometry{colors}"
