"""How fast do two views of real JPEGs come, beside a torch DataLoader that makes the same ones?

    python benchmarks/bench_loader.py --shards '/data/imagenet/train-*.tar'

Predictions, written before the first run (2 CPU cores, DESIGN's measurements): torch DataLoader with PIL and
colour 95-105 images/s a core; our DALI graph 120-150, indexed and stream within 5 % of each other, since
decoding binds and reading does not; without colour about 180 a core against 173.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Measurement, interleave, summarise, time_batches, write_result
from PIL import Image
from torchvision.transforms import v2

from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import ViewConfig, build_loader, expand_shards, synthetic_batches
from cmae.pipeline.index import load_index

CORES = len(os.sched_getaffinity(0))


class TorchTwoViews(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same two views by PIL and torchvision, read from the same tars by their offsets."""

    def __init__(self, shards: list[str], views: ViewConfig) -> None:
        self.shards = shards
        self.places = [
            (number, int(offset), int(size))
            for number, shard in enumerate(shards)
            for offset, size in zip(*_offsets(shard), strict=True)
        ]
        self.views = views
        self.master = v2.Compose(
            [
                v2.RandomResizedCrop(
                    views.master_size,
                    scale=(views.min_area, views.max_area),
                    ratio=(views.min_aspect, views.max_aspect),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(views.hflip_prob),
            ]
        )
        jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
        blur = v2.GaussianBlur(23, (views.blur_sigma_min, views.blur_sigma_max))
        self.color = v2.Compose(
            [
                v2.RandomApply([jitter], views.jitter_prob),
                v2.RandomGrayscale(views.grayscale_prob),
                v2.RandomApply([blur], views.blur_prob),
            ]
        )

    def __len__(self) -> int:
        """Samples in all shards."""
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Online and target view, uint8 (H, W, 3)."""
        number, offset, size = self.places[index]
        descriptor = os.open(self.shards[number], os.O_RDONLY)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        master = self.master(Image.open(io.BytesIO(data)).convert("RGB"))
        side, shift = self.views.img_size, self.views.target_shift
        top, left = random.randint(0, shift), random.randint(0, shift)
        online = master.crop((0, 0, side, side))
        target = master.crop((left, top, left + side, top + side))
        if self.views.color != "none":
            target = self.color(target)
        return torch.from_numpy(np.array(online)), torch.from_numpy(np.array(target))


def _offsets(shard: str) -> tuple[np.ndarray, np.ndarray]:
    index = load_index(shard)
    return index.offset, index.size


def torch_run(shards: list[str], views: ViewConfig, arguments: argparse.Namespace) -> Measurement:
    """One timed stretch of the torch DataLoader."""
    loader = torch.utils.data.DataLoader(
        TorchTwoViews(shards, views),
        batch_size=arguments.batch_size,
        shuffle=True,
        num_workers=CORES,
        drop_last=True,
        persistent_workers=True,
    )
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    sizes = (len(online) for online, _ in endless)
    return time_batches(sizes, warmup=CORES, count=arguments.batches)


def cmae_run(
    shards: list[str], views: ViewConfig, arguments: argparse.Namespace, source: str
) -> Measurement:
    """One timed stretch of our loader."""
    with build_loader(
        shards,
        views,
        batch_size=arguments.batch_size,
        global_batch_size=arguments.batch_size,
        draw_mask=_mask,
        num_threads=CORES,
        source=source,
    ) as loader:
        sizes = (len(batch.online) for batch in loader)
        return time_batches(sizes, warmup=3, count=arguments.batches)


def synthetic_run(views: ViewConfig, arguments: argparse.Namespace) -> Measurement:
    """The ceiling: batches that are ready, through the same mask and Batch."""
    batches = synthetic_batches(
        views, batch_size=arguments.batch_size, device="cpu", draw_mask=_mask, seed=0
    )
    return time_batches((len(batch.online) for batch in batches), warmup=1, count=arguments.batches)


def _mask(sample_index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_mask(ModelConfig(), sample_index, seed=0, epoch=epoch)


def build_contenders(
    shards: list[str], arguments: argparse.Namespace
) -> Iterator[tuple[str, str, Callable[[], Measurement]]]:
    """(colour mode, name, run) of everything that is compared."""
    for color in arguments.colors:
        views = ViewConfig(color=color)
        yield (
            color,
            "cmae indexed",
            lambda views=views: cmae_run(shards, views, arguments, "indexed"),
        )
        yield color, "cmae stream", lambda views=views: cmae_run(shards, views, arguments, "stream")
        if color != "fast":
            yield (
                color,
                "torch DataLoader + PIL + torchvision v2",
                lambda views=views: torch_run(shards, views, arguments),
            )
    views = ViewConfig(color="none")
    yield "-", "synthetic ceiling", lambda: synthetic_run(views, arguments)


def default_shards() -> str:
    """The research sample beside the checkout, or where CMAE_DATA says."""
    root = Path(
        os.environ.get("CMAE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    )
    return str(root / "imagenet-sample" / "*.tar")


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", default=default_shards(), help="tars with sidecar indexes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10, help="timed batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--colors", nargs="+", default=["exact", "fast", "none"])
    arguments = parser.parse_args()
    shards = expand_shards(arguments.shards)
    contenders = {
        f"{color}: {name}": run for color, name, run in build_contenders(shards, arguments)
    }
    measured = interleave(contenders, rounds=arguments.rounds)
    rows: list[dict[str, Any]] = [
        {
            "color": name.split(": ")[0],
            "loader": name.split(": ", 1)[1],
            "images_per_s_per_core": summarise([m.images_per_s / CORES for m in results]),
            "cpu_s_per_1000_images": summarise([m.cpu_s_per_1000 for m in results]),
        }
        for name, results in measured.items()
    ]
    config = {key: value for key, value in vars(arguments).items() if key != "shards"}
    config |= {"data": Path(arguments.shards).parent.name, "shards": len(shards), "threads": CORES}
    write_result("loader", config=config, rows=rows)


if __name__ == "__main__":
    main()
