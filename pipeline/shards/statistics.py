"""Look at shards: statistics from their indices, class names, and a sheet of sample images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.images.jpeg import JpegKind
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.members.member_counts import MemberCounts, sum_members


@dataclass(frozen=True)
class ShardStatistics:
    """Facts about the samples of some shards, from their indices alone."""

    num_shards: int
    num_samples: int
    """Images that can be decoded."""
    num_bad: int
    """Images that cannot."""
    samples_per_shard: tuple[int, int]
    """Smallest and largest."""
    image_bytes: int
    """Sum over all images."""
    downscaled: dict[str, int]
    """Images re-encoded by `cmae shards write --max-size`, by setting."""
    percentiles: tuple[int, ...]
    """Which percentiles the next four give."""
    bytes_at: tuple[int, ...]
    """Bytes of an image."""
    megapixels_at: tuple[float, ...]
    width_at: tuple[int, ...]
    height_at: tuple[int, ...]
    kinds: dict[str, int]
    """Images of each JpegKind, most frequent first."""
    orientations: dict[int, int]
    """Images of each EXIF orientation."""
    num_unlabelled: int
    class_counts: dict[int, int]
    """Images of each label that occurs."""
    members: MemberCounts
    """What became of every entry of the tars."""


def shard_statistics(shards: Sequence[str | Path]) -> ShardStatistics:
    """Summarise shards from their indices; no image is read.

    Raises:
        FileNotFoundError, StaleIndexError: See `DatasetIndex.load`.
    """
    index = DatasetIndex.load(shards)
    at = (0, 5, 25, 50, 75, 95, 100)
    labels, counts = np.unique(index.label[index.label != NO_LABEL], return_counts=True)
    kinds = Counter(index.kind.tolist()).most_common()
    pixels = index.height.astype(np.int64) * index.width
    return ShardStatistics(
        num_shards=len(index.paths),
        num_samples=len(index),
        num_bad=index.num_bad,
        samples_per_shard=(int(index.shard_sizes.min()), int(index.shard_sizes.max())),
        image_bytes=int(index.size.sum()),
        downscaled=index.downscaled,
        percentiles=at,
        bytes_at=tuple(map(int, np.percentile(index.size, at))),
        megapixels_at=tuple(float(x) for x in np.percentile(pixels / 1e6, at)),
        width_at=tuple(map(int, np.percentile(index.width, at))),
        height_at=tuple(map(int, np.percentile(index.height, at))),
        kinds={JpegKind(kind).name.lower(): count for kind, count in kinds},
        orientations=dict(sorted(Counter(index.orientation.tolist()).items())),
        num_unlabelled=int((index.label == NO_LABEL).sum()),
        class_counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        members=sum_members(index.members),
    )
