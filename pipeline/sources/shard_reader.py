"""What reads the bytes of records, wherever their shards lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from jaxtyping import UInt8
from numpy import ndarray

from cmae.pipeline.formats.dataset_index import Place


class LostShard(NamedTuple):
    """Stands for the bytes of a record whose shard cannot be read now: deleted, or its disk is gone."""

    reason: str


class ShardReader(Protocol):
    """The shards of a data set, read at byte offsets from any number of threads."""

    is_local: bool
    """Whether all shards are files here."""

    def read_batch(
        self, places: Sequence[Place], buffer: UInt8[ndarray, " n"]
    ) -> Iterator[UInt8[ndarray, " size"] | LostShard]:
        """The bytes of each place in turn, written to `buffer` one after another.

        What comes is shorter than its place where the shard ends before.

        Raises:
            DataError: The bytes cannot be had, and others in their stead would not help.
        """

    def check_unchanged(self, shard: int) -> None:
        """Compare a shard with what it was when it was first read.

        Raises:
            DataError: It is another one, and its index no longer belongs to it.
        """

    def close(self) -> None:
        """End reads under way where they take long, and close the files."""
