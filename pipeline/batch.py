"""The two objects that cross from the pipeline to training: a batch, and the place in the data behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Int32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class LoaderState:
    """Where the data stands: everything that is needed to continue with the very next sample.

    It holds no rank and no world size. `next_sample` is an offset in the permuted epoch for an indexed
    source, and the number of shards done by all ranks together for a stream. `to_dict` makes at most 99
    bytes of JSON without blanks (63-bit seed, 6 digits of epoch, 13 of next_sample).
    """

    seed: int
    epoch: int
    next_sample: int
    digest: str
    """Identity of the data set (of its index, or of the list of URLs)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoaderState:
        """The inverse of `to_dict`."""
        return cls(**values)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, ready on the device. B samples, K visible and M masked patches."""

    online: UInt8[Tensor, "B H W 3"]
    target: UInt8[Tensor, "B H W 3"] | None
    """None when the views have num_views=1."""
    ids_keep: Int32[Tensor, "B K"]
    ids_mask: Int32[Tensor, "B M"]
    sample_id: Int64[Tensor, " B"]
    """(shard number << 32) | record number in the shard."""
    label: Int64[Tensor, " B"]
    """-1 where the data has none."""
    epoch: int
    state: LoaderState
    """The place in the data after this batch: what a checkpoint taken now has to hold."""


DrawMask = Callable[[Int64[Tensor, " B"], int], tuple[Tensor, Tensor]]
"""(sample_id, epoch) -> (ids_keep, ids_mask), on the device of sample_id."""
