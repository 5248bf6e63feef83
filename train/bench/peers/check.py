"""Do a peer's views hold what it states?"""

from __future__ import annotations

import torch

from cmae.pipeline import ViewConfig
from cmae.train.bench.peers.contract import MEAN, STD, Job, Peer


def check_peer(peer: Peer, job: Job, *, expected_mean: float, batches: int = 3) -> None:
    """Assert shapes, types, statistics, and without colours that the target is a shifted crop.

    Args:
        peer: Loader whose first batches are looked at.
        job: What it is asked for.
        expected_mean: Mean of our online views, in levels.
        batches: Number of batches to look at.

    Raises:
        AssertionError: Names the peer and what does not hold.
    """
    with peer.open(job) as pairs:
        found = [next(pairs) for _ in range(batches)]
    online, target = (torch.cat([_to_uint8_nhwc(pair[i], peer) for pair in found]) for i in (0, 1))
    side = job.views.img_size
    shape = (batches * job.batch_size, side, side, 3)
    for name, view in (("online", online), ("target", target)):
        assert view.shape == shape, f"{peer.name}: {name} is {tuple(view.shape)}, not {shape}"
        mean, deviation = view.float().mean().item(), view.float().std().item()
        assert abs(mean - expected_mean) < 12, f"{peer.name}: {name} mean {mean:.1f} levels"
        assert deviation > 20, f"{peer.name}: {name} deviation {deviation:.1f} levels"
    if job.views.color == "none":
        shifts = [_find_shift(a, b, job.views) for a, b in zip(online, target, strict=True)]
        assert None not in shifts, f"{peer.name}: a target is no shifted crop of its source crop"
        assert len(set(shifts)) > 1, f"{peer.name}: every target is shifted alike"
    else:
        changed = (online[:, : side // 2] != target[:, : side // 2]).any((1, 2, 3))
        assert changed.any(), f"{peer.name}: no target differs from its online view"
    flat = online.flatten(1).float()
    assert len(torch.unique(flat.mean(1))) > len(flat) // 2, f"{peer.name}: images repeat"


def _to_uint8_nhwc(view: torch.Tensor, peer: Peer) -> torch.Tensor:
    dtype = peer.layout.split()[0]
    assert view.dtype == getattr(torch, dtype), f"{peer.name}: {view.dtype}, not {dtype}"
    if peer.layout == "float32 NCHW":
        scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
        view = (view * scale + shift).round().to(torch.uint8).permute(0, 2, 3, 1)
    return view.cpu()


def _find_shift(
    online: torch.Tensor, target: torch.Tensor, views: ViewConfig
) -> tuple[int, int] | None:
    """(y, x) by which the target lies further down and right in the source crop; None if there is none."""
    side, limit = views.img_size, views.target_shift + 1
    for top in range(limit):
        for left in range(limit):
            is_row = torch.equal(online[top, left:], target[0, : side - left])  # saves the rest
            if is_row and torch.equal(online[top:, left:], target[: side - top, : side - left]):
                return top, left
    return None
