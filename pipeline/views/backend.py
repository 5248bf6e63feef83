"""What every view backend promises, and which of a batch's images cannot be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import nvidia.nvimgcodec as nvimgcodec
import torch
from jaxtyping import UInt8
from torch import Tensor

from cmae.pipeline.formats.images.jpeg import build_cpu_decoder
from cmae.pipeline.stage_stats import Stage
from cmae.pipeline.views.params import ViewParams


class ViewBackend(Protocol):
    """Turns encoded images and drawn parameters into pixels, asynchronously."""

    stage: Stage
    """Counts of the threads that make the views."""

    def depth(self, batch_size: int) -> int:
        """Batches to have submitted at once, so that no worker is ever without work."""

    def submit(self, encoded: list[UInt8[np.ndarray, " n"]], params: ViewParams) -> Any:
        """Start a batch and return its handle."""

    def collect(self, job: Any) -> Views:
        """Wait for a batch."""

    def cancel(self) -> None:
        """Drop work that has not begun; `collect` fails for it, in whatever thread."""

    def close(self) -> None:
        """Release threads and memory."""


UNDECODABLE = "the JPEG decoder gave up"


@dataclass(frozen=True)
class Views:
    """A batch of views, or, when a sample could not be decoded, which ones and why."""

    online: UInt8[Tensor, "B H W 3"] | None
    target: UInt8[Tensor, "B H W 3"] | None
    bad: dict[int, str]


class WindowDecoder:
    """Decodes windows of JPEGs to RGB; one for each thread."""

    def __init__(self) -> None:
        self._decoder = build_cpu_decoder(options=":fancy_upsampling=1")
        self._params = nvimgcodec.DecodeParams(
            color_spec=nvimgcodec.SRGB, apply_exif_orientation=False
        )

    def decode(
        self, encoded: UInt8[np.ndarray, " n"], crop: np.ndarray
    ) -> UInt8[Tensor, "h w 3"] | None:
        """The window (top, left, height, width) of a JPEG, or None when it cannot be decoded."""
        top, left, height, width = map(int, crop)
        region = nvimgcodec.Region(top, left, top + height, left + width)
        try:
            stream = nvimgcodec.CodeStream(encoded).get_sub_code_stream(region=region)
        except RuntimeError:  # the header is not one it knows
            return None
        image = self._decoder.decode(stream, params=self._params)
        return None if image is None else torch.from_numpy(np.asarray(image))


def find_undecodable(
    encoded: Sequence[UInt8[np.ndarray, " n"]], params: ViewParams
) -> dict[int, str]:
    """Decode samples one by one to find out which of them failed a batch."""
    decoder = WindowDecoder()
    return {
        i: UNDECODABLE
        for i, data in enumerate(encoded)
        if decoder.decode(data, params.crop[i]) is None
        or decoder.decode(data, params.target_crop[i]) is None
    }
