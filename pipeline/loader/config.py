"""The loader's configuration: the `data` section of a recipe, and the argument of `build_loader`.

It loads neither torch nor DALI. The attribute docstrings are the text of `cmae pretrain --help`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cmae.errors import CmaeError, require
from cmae.paths import expand_home
from cmae.pipeline.remote.schemes import REDACTED
from cmae.pipeline.views.config import ViewConfig

FOR_THE_MACHINE = (
    *("num_threads", "prefetch", "num_readers", "hw_decoder_load", "view_backend", "gpu_decode"),
)
"""Settings that follow the machine: batches hold the same with any of them, within the pixels' rounding."""

FROM_THE_RUN = {
    "batch_size": "speed.micro_batch_size",
    "global_batch_size": "optim.global_batch_size",
    "seed": "seed",
}
"""Settings that a training run takes from another key of its recipe."""


@dataclass(frozen=True)
class LoaderConfig:
    """Which images, which views of them, and how they are read."""

    shards: str | list[str] = ""
    """WebDataset tars: a folder, a glob, braces such as 'x-{000000..000099}.tar', all of these also behind
    http(s), s3 and gs URLs, or 'pipe:' commands, or a list of these."""
    source: Literal["auto", "indexed", "stream"] = "auto"
    """'indexed' reads by the sidecar index: exact resume, global shuffle. 'stream' reads tars front
    to back: resume by shard. 'auto' takes the index when every shard has one."""
    batch_size: int | None = None
    """Images in a batch of one rank. None: global_batch_size / number of ranks."""
    global_batch_size: int | None = None
    """Images in an optimiser step over all ranks, a multiple of the number of ranks times batch_size; an
    epoch has whole global batches. None: one batch of every rank."""
    seed: int = 0
    """Seeds the order of the samples and the views."""
    shuffle: bool = True
    """Draw a new order of the samples in every epoch."""
    shuffle_block: int = 1
    """Consecutive samples that stay near each other in that order. 1 shuffles uniformly, at no cost where any
    sample can be read at once. For remote shards and a cache smaller than the data set: the samples of a
    shard, so that only shuffle_window / shuffle_block shards are in use at a time. No effect on a stream."""
    shuffle_window: int = 16384
    """Samples among which blocks are mixed; without effect when shuffle_block is 1."""
    last_batch: Literal["drop", "pad"] = "drop"
    """Samples at an epoch's end that do not fill a global batch: 'drop' leaves them out, others in each
    epoch; 'pad' takes them, and fills up with the epoch's first samples, which then come twice. A stream
    can only drop: each rank leaves out what does not fill its own last batch."""
    max_bad_fraction: float = 0.01
    """Stop all ranks, with a checkpoint, when more than this fraction of all samples since step 0 could not
    be read or decoded. Not looked at in the first 1000 samples."""
    num_threads: int | None = None
    """CPU threads that decode, for each rank. null: the node's cores, shared out to its ranks."""
    prefetch: int = 2
    """Batches that are ready ahead of the training step."""
    num_readers: int = 4
    """Batches that are read at the same time, with an index."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for the GPU's decoder unit, between 0 and 1; the best one differs by machine."""
    view_backend: Literal["auto", "dali", "cpu"] = "auto"
    """What decodes and crops: DALI, or torch's own CPU operators on threads, which are faster without a
    GPU. 'auto' takes DALI on a GPU. The pixels agree within rounding."""
    gpu_decode: Literal["auto", "window", "whole", "cpu"] = "auto"
    """How DALI decodes for a GPU: the wanted window alone, the whole image with the window cut out of it on
    the GPU, or windows on the CPU. 'auto' tries them in this order on drawn JPEGs, in a process of its own at
    the start, and takes the first whose pixels are right. They agree within rounding."""
    remote: Literal["auto", "cache", "range", "stream"] = "auto"
    """How shards behind URLs are read. 'cache' copies them to `cache_dir` in the background and reads by
    byte range what is not there yet; 'range' keeps nothing on the disk; 'stream' reads front to back.
    'auto': 'cache' when `cache_dir` is set, else 'range'; 'stream' where there is no index."""
    cache_dir: Path | None = None
    """Folder on a disk of each node for copies of remote shards; runs and ranks share it."""
    cache_quota_gib: float | None = None
    """Largest size of the shards in `cache_dir`. null: nine tenths of the free disk."""
    remote_deadline_s: float = 300.0
    """Longest time to read one batch from a store, retries included, and of several ranks to get the batches
    of a step; below the ranks' timeout of 600 s."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Options of fsspec's file system, such as {endpoint_url: ..., anon: true}. Keys and tokens are better
    given by the environment; here they are replaced by *** in all files of the run."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Crops and colour operations."""

    def __post_init__(self) -> None:
        """Refuse what is out of range, and secrets that were replaced by stars."""
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", expand_home(self.cache_dir))
        if str(self.view_backend) == "host":
            warnings.warn("view_backend='host' is 'cpu' now", FutureWarning, stacklevel=3)
            object.__setattr__(self, "view_backend", "cpu")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, name, value, f"{', '.join(allowed[:-1])} or {allowed[-1]}")
        for name in ("shuffle_block", "shuffle_window", "prefetch", "num_readers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("batch_size", "global_batch_size", "num_threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, ">= 1, or null")
        for name in ("max_bad_fraction", "hw_decoder_load"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        self._check_remote()

    def _check_remote(self) -> None:
        quota, deadline = self.cache_quota_gib, self.remote_deadline_s
        require(quota is None or quota > 0, "cache_quota_gib", quota, "> 0, or null")
        require(deadline > 0, "remote_deadline_s", deadline, "> 0")
        require(
            self.remote != "cache" or self.cache_dir is not None,
            "cache_dir",
            self.cache_dir,
            "a folder on a disk of this node when remote is 'cache'",
        )
        for name in ("shards", "storage_options"):
            require(
                REDACTED not in str(getattr(self, name)),
                name,
                REDACTED,
                f"given in full: {REDACTED} stands for a secret in the files of a run",
                repair="give it again, or by the environment",
            )

    def resolved(self, world_size: int = 1) -> LoaderConfig:
        """The same configuration with both batch sizes and the number of threads filled in.

        Args:
            world_size: Number of ranks.

        Raises:
            CmaeError: There is no batch size, or the sizes do not divide.
        """
        batch_size, global_batch_size = self.batch_size, self.global_batch_size
        if batch_size is None and global_batch_size is None:
            raise CmaeError(
                "batch_size and global_batch_size are both None; set batch_size, the images in a batch of "
                "one rank",
                key="batch_size",
            )
        if global_batch_size is None:
            assert batch_size is not None
            global_batch_size = world_size * batch_size
        if batch_size is None:
            batch_size = max(1, global_batch_size // world_size)
        if global_batch_size % (world_size * batch_size):
            raise CmaeError(
                f"global_batch_size={global_batch_size} must be a multiple of world_size * batch_size = "
                f"{world_size} * {batch_size}: an optimiser step is a whole number of batches of every rank",
                key="global_batch_size",
            )
        num_threads = self.num_threads or len(os.sched_getaffinity(0))
        return replace(
            self,
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            num_threads=num_threads,
        )


_CHOICES = {
    "source": ("auto", "indexed", "stream"),
    "last_batch": ("drop", "pad"),
    "view_backend": ("auto", "dali", "cpu"),
    "gpu_decode": ("auto", "window", "whole", "cpu"),
    "remote": ("auto", "cache", "range", "stream"),
}
