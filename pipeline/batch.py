"""The two objects that cross from the pipeline to training: a batch, and the place in the data behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class LoaderState:
    """Where the data stands: everything that is needed to continue with the very next sample.

    It holds no rank and no world size. `to_dict` makes at most 124 bytes of JSON without blanks (63-bit seed,
    6 digits of epoch, 13 of offset).
    """

    seed: int
    epoch: int
    offset: int
    """Units of the permuted epoch that all ranks together have behind them."""
    digest: str
    """Identity of the data set (of its index, or of the list of URLs)."""
    unit: Literal["sample", "shard", "unstated"] = "sample"
    """What `offset` counts: samples with an index, shards in a stream. 'unstated': a state from before units
    were stored; the source of its digest knows which it was."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoaderState:
        """The inverse of `to_dict`; also takes the form of checkpoints from before units were stored."""
        if "next_sample" in values:
            kept = {name: value for name, value in values.items() if name != "next_sample"}
            return cls(**kept, offset=values["next_sample"], unit="unstated")
        return cls(**values)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, ready on the device. B samples, K visible and M masked patches."""

    online: UInt8[Tensor, "B H W 3"]
    target: UInt8[Tensor, "B H W 3"] | None
    """None when the views have num_views=1."""
    ids_keep: Int32[Tensor, "B K"] | None
    """Visible patches; None from a loader without `draw_mask`."""
    ids_mask: Int32[Tensor, "B M"] | None
    """Masked patches; None together with `ids_keep`."""
    sample_id: Int64[Tensor, " B"]
    """(shard number << 32) | record number in the shard."""
    label: Int64[Tensor, " B"]
    """-1 where the data has none."""
    epoch: int
    state: LoaderState
    """The place in the data after this batch: what a checkpoint taken now has to hold."""

    @property
    def masks(self) -> tuple[Int32[Tensor, "B K"], Int32[Tensor, "B M"]]:
        """`ids_keep` and `ids_mask` of a batch that has them.

        Raises:
            ValueError: The loader was built without `draw_mask`.
        """
        if self.ids_keep is None or self.ids_mask is None:
            raise ValueError("this batch has no masks; give draw_mask to build_loader")
        return self.ids_keep, self.ids_mask


DrawMask = Callable[[Int64[Tensor, " B"], int], tuple[Tensor, Tensor]]
"""(sample_id, epoch) -> (ids_keep, ids_mask), on the device of sample_id."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, ordered on the current stream; the host does not wait.

    From pageable memory the copy would wait for all that is queued on the stream. torch keeps the pinned
    memory until the copy has passed.
    """
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()  # others would go through pageable memory
    return tensor.to(device, non_blocking=True)
