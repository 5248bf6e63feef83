from __future__ import annotations

from itertools import islice

import pytest
import torch
from support.pipeline_data import toy_mask

from cmae.pipeline import ViewConfig, synthetic_batches


@pytest.mark.parametrize("num_views", [1, 2])
def test_synthetic_batches_look_like_the_loaders(num_views):
    views = ViewConfig(num_views=num_views, img_size=32, source_crop_size=40, target_shift=8)
    batches = synthetic_batches(views, batch_size=6, device="cpu", draw_mask=toy_mask, seed=0)
    first, second = islice(batches, 2)
    assert first.online.shape == (6, 32, 32, 3)
    assert first.online.dtype == torch.uint8
    assert (first.target is None) == (num_views == 1)
    assert first.sample_id.tolist() == list(range(6))
    assert second.sample_id.tolist() == list(range(6, 12))
    assert not torch.equal(first.ids_keep, second.ids_keep)
    assert second.state.offset == 12
    again = next(synthetic_batches(views, batch_size=6, device="cpu", draw_mask=toy_mask, seed=0))
    assert torch.equal(again.online, first.online)
