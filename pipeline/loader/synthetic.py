"""Batches without data: what a step costs when the loader costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cmae.pipeline.batch import Batch, DrawMask, LoaderState
from cmae.pipeline.views.config import ViewConfig


def synthetic_batches(
    views: ViewConfig,
    *,
    batch_size: int,
    device: str | torch.device,
    draw_mask: DrawMask | None = None,
    seed: int = 0,
) -> Iterator[Batch]:
    """Endless batches of the loader's shapes and types.

    Pixels are drawn once and given again each time; ids and masks are new in every batch.
    Without `draw_mask` there are no masks.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch_size, views.img_size, views.img_size, 3)

    def pixels() -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    online, target = pixels(), pixels() if views.has_target else None
    label = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
    start = 0
    while True:
        sample_id = torch.arange(start, start + batch_size, device=device)
        ids_keep, ids_mask = draw_mask(sample_id, 0) if draw_mask else (None, None)
        start += batch_size
        state = LoaderState(seed, epoch=0, offset=start, digest="synthetic")
        yield Batch(online, target, ids_keep, ids_mask, sample_id, label, epoch=0, state=state)
