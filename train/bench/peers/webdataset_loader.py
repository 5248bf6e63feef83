"""The webdataset library as its documentation uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version

import webdataset as wds

from cmae.train.bench.peers.contract import Job, Pair, Peer
from cmae.train.bench.peers.pillow_views import PillowViews, describe_pillow


def find(job: Job) -> Iterator[Peer]:
    """Webdataset with Pillow's views."""
    yield Peer(
        "webdataset + DataLoader, PIL",
        f"{describe_pillow(job.views)}; shards drawn with replacement, window shuffle",
        f"webdataset {version('webdataset')}",
        "uint8 NHWC",
        webdataset_loader,
    )


@contextlib.contextmanager
def webdataset_loader(job: Job) -> Iterator[Iterator[Pair]]:
    """The webdataset library's own reader and shuffle in the workers of a DataLoader."""
    make_views = PillowViews(job.views)
    # Shards are drawn with replacement: any number of workers can share any number of shards.
    dataset = wds.WebDataset(job.shards, resampled=True, shardshuffle=False)
    dataset = dataset.shuffle(256).to_tuple("jpg;jpeg").map(lambda sample: make_views(sample[0]))
    loader = wds.WebLoader(
        dataset.batched(job.batch_size, partial=False), batch_size=None, num_workers=job.threads
    )
    batches = iter(loader)
    yield ((online, target) for online, target in batches)
    del batches
