"""The two views of a sample: what may be configured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cmae.errors import require

ViewStep = Literal["decode", "resize", "crop", "color"]
"""Operations on an image in their order; a flip belongs to the resize."""

DecodeWay = Literal["window", "whole", "cpu"]
"""How a window of a JPEG is decoded for a GPU, see `cmae.pipeline.views.decode_check`."""


@dataclass(frozen=True)
class ViewConfig:
    """How one JPEG becomes an online and a target view (method of the paper, section 3.1).

    A random window of the image is resized to a square source crop, flipped or not; each view is an
    img_size crop of that at its own offset, and the target view gets colour operations.
    """

    img_size: int = 224
    """Height and width of a view in pixels."""
    source_crop_size: int = 256
    """Height and width in pixels of the source crop, from which both views are cropped."""
    num_views: int = 2
    """2 = online and target; 1 = online only (MAE: set source_crop_size to img_size for one plain
    RandomResizedCrop)."""
    min_area: float = 0.2
    """Smallest window as a fraction of the image's area, (0, 1]."""
    max_area: float = 1.0
    """Largest window as a fraction of the image's area, (0, 1]."""
    min_aspect: float = 0.75
    """Smallest width / height of the window."""
    max_aspect: float = 4 / 3
    """Largest width / height of the window."""
    window: Literal["random", "centre"] = "random"
    """'random': a window of RandomResizedCrop, drawn for each sample and epoch; 'centre': the same centred
    square each time, for evaluation (with hflip_prob 0)."""
    centre_share: float = 0.875
    """Side of the centred square over the image's shorter side, (0, 1]; .875 is what a resize to 256 px and a
    centre crop of 224 leave."""
    hflip_prob: float = 0.5
    """Probability of a horizontal flip, shared by both views."""
    online_shift: int = 0
    """Largest offset of the online crop in the source crop in pixels, inclusive; 0 = always the corner."""
    target_shift: int = 31
    """Largest offset of the target crop in the source crop in pixels, inclusive; drawn for each axis."""
    target_crop: Literal["shift", "random_resized"] = "shift"
    """'shift' crops the target from the source crop; 'random_resized' from the image, with a window and a
    flip of its own (one more decode)."""
    color: Literal["exact", "fast", "none"] = "exact"
    """Colour operations of the target: 'exact' = torchvision's; 'fast' = one 3x3 matrix for the whole
    jitter (contrast about mid grey, hue as a rotation in YIQ); 'none' = none at all."""
    jitter_prob: float = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in random order."""
    brightness: float = 0.4
    """Factor is uniform in [max(0, 1 - brightness), 1 + brightness]; 0 = off."""
    contrast: float = 0.4
    """Factor is uniform in [max(0, 1 - contrast), 1 + contrast]; 0 = off."""
    saturation: float = 0.4
    """Factor is uniform in [max(0, 1 - saturation), 1 + saturation]; 0 = off."""
    hue: float = 0.1
    """Hue turns by a uniform part of the circle in [-hue, hue], at most 0.5; 0 = off."""
    grayscale_prob: float = 0.2
    """Probability of losing the colours, after the jitter."""
    blur_prob: float = 0.5
    """Probability of a Gaussian blur, last."""
    blur_sigma_min: float = 0.1
    """Smallest standard deviation of the blur in pixels."""
    blur_sigma_max: float = 2.0
    """Largest standard deviation of the blur in pixels; at most 2.75, the kernel has 23 taps."""

    def __post_init__(self) -> None:
        """Refuse values that no view can be made from."""
        for name in ("hflip_prob", "jitter_prob", "grayscale_prob", "blur_prob"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("brightness", "contrast", "saturation"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(self.img_size >= 1, "img_size", "at least 1")
        self._require(self.num_views in (1, 2), "num_views", "1 or 2")
        self._require(0 < self.min_area <= self.max_area <= 1, "min_area", "in (0, max_area]")
        self._require(0 < self.min_aspect <= self.max_aspect, "min_aspect", "in (0, max_aspect]")
        self._require(self.window in ("random", "centre"), "window", "random or centre")
        self._require(0 < self.centre_share <= 1, "centre_share", "in (0, 1]")
        self._require(0 <= self.hue <= 0.5, "hue", "between 0 and 0.5")
        self._require(
            0 < self.blur_sigma_min <= self.blur_sigma_max <= 2.75,
            "blur_sigma_min",
            "in (0, blur_sigma_max], with blur_sigma_max at most 2.75",
        )
        self._require(
            self.target_crop in ("shift", "random_resized"), "target_crop", "shift, random_resized"
        )
        self._require(self.color in ("exact", "fast", "none"), "color", "exact, fast or none")
        room = self.source_crop_size - self.img_size
        self._require(room >= 0, "source_crop_size", f"at least img_size={self.img_size}")
        self._require(
            0 <= self.online_shift <= room,
            "online_shift",
            f"0..{room} (source_crop_size - img_size)",
        )
        if self.has_target and self.target_crop == "shift":
            self._require(
                0 <= self.target_shift <= room,
                "target_shift",
                f"0..{room} (source_crop_size - img_size)",
            )

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, f"views.{name}", getattr(self, name), allowed)

    @property
    def has_target(self) -> bool:
        """Whether there is a second view."""
        return self.num_views == 2

    @property
    def has_own_target_crop(self) -> bool:
        """Whether the target is a window of the image, not of the source crop."""
        return self.has_target and self.target_crop == "random_resized"

    @property
    def has_color(self) -> bool:
        """Whether the target's colours are changed."""
        return self.has_target and self.color != "none"
