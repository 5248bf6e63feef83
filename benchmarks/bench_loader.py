"""How fast do two views of real JPEGs come, beside a torch DataLoader that makes the same ones?

    python benchmarks/bench_loader.py --shards '/data/imagenet/train-*.tar'

Without --shards it takes the research sample, or photographs of scikit-image where there is none: the result
file says which.

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
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from harness import ROOT, Measurement, interleave, summarise, time_batches, write_result
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import ViewConfig, build_loader, expand_shards, synthetic_batches
from cmae.pipeline.index import build_index, index_path, load_index, save_index
from cmae.train.demo_data import PHOTOGRAPHS, load_photograph

CORES = len(os.sched_getaffinity(0))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
        self.color = v2.Compose(
            [
                v2.RandomApply([jitter], views.jitter_prob),
                v2.RandomGrayscale(views.grayscale_prob),
                v2.RandomApply([self.blur], views.blur_prob),
            ]
        )

    def blur(self, image: Image.Image) -> Image.Image:
        """Pillow's blur: torchvision's is a float convolution, several times slower on a CPU."""
        sigma = random.uniform(self.views.blur_sigma_min, self.views.blur_sigma_max)
        return image.filter(ImageFilter.GaussianBlur(sigma))

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
    shards: list[str],
    views: ViewConfig,
    arguments: argparse.Namespace,
    *,
    source: str,
    backend: str,
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
        backend=backend,
        device=DEVICE,
    ) as loader:
        sizes = (len(batch.online) for batch in loader)
        return time_batches(sizes, warmup=3, count=arguments.batches)


def synthetic_run(views: ViewConfig, arguments: argparse.Namespace) -> Measurement:
    """The ceiling: batches that are ready, through the same mask and Batch."""
    batches = synthetic_batches(
        views, batch_size=arguments.batch_size, device=DEVICE, draw_mask=_mask, seed=0
    )
    return time_batches((len(batch.online) for batch in batches), warmup=1, count=arguments.batches)


def _mask(sample_index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_mask(ModelConfig(), sample_index, seed=0, epoch=epoch)


def build_contenders(
    shards: list[str], arguments: argparse.Namespace
) -> Iterator[tuple[str, str, Callable[[], Measurement]]]:
    """(colour mode, name, run) of everything that is compared."""
    backends = ("dali",) if DEVICE == "cuda" else ("host", "dali")
    for color in arguments.colors:
        views = ViewConfig(color=color)
        for source, backend in [*(("indexed", name) for name in backends), ("stream", backends[0])]:
            run = partial(cmae_run, shards, views, arguments, source=source, backend=backend)
            yield color, f"cmae {source}, {backend}", run
        if color != "fast":
            name = "torch DataLoader, PIL + torchvision v2"
            yield color, name, partial(torch_run, shards, views, arguments)
    yield "-", "synthetic ceiling", partial(synthetic_run, ViewConfig(color="none"), arguments)


def prepare_shards(pattern: str | None, folder: Path) -> tuple[list[str], str]:
    """Indexed shards and what they hold; tars without an index are linked and indexed in `folder`."""
    if pattern is None:
        root = Path(os.environ.get("CMAE_DATA", ROOT.parent / "shared" / "data"))
        sample = root / "imagenet-sample"
        pattern = str(sample / "*.tar") if sample.is_dir() else write_photographs(folder)
    paths = expand_shards(pattern)
    if not all(index_path(path).exists() for path in paths):
        links = [folder / Path(path).name for path in paths]
        for link, path in zip(links, paths, strict=True):
            link.symlink_to(Path(path).resolve())
            save_index(build_index(link), index_path(link))
        paths = [str(link) for link in links]
    sizes = [int(size) for path in paths for size in load_index(path).size]
    return (
        paths,
        f"{len(sizes)} JPEGs of {np.mean(sizes) / 1000:.0f} kB ({Path(pattern).parent.name})",
    )


def write_photographs(folder: Path) -> str:
    """A stand-in where there is no ImageNet: 256 crops of 500 x 375 px from scikit-image's photographs."""
    rng = np.random.default_rng(0)
    path = folder / "photographs" / "photographs-000000.tar"
    path.parent.mkdir()
    with wds.TarWriter(str(path)) as tar:
        for number in range(256):
            image = Image.fromarray(load_photograph(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]))
            image = image.resize((750, 750 * image.height // image.width))
            top = int(rng.integers(0, max(1, image.height - 375)))
            left = int(rng.integers(0, 250))
            crop = io.BytesIO()
            image.crop((left, top, left + 500, top + 375)).save(crop, "JPEG", quality=95)
            tar.write({"__key__": f"{number:04d}", "jpg": crop.getvalue(), "cls": str(number % 16)})
    return str(path)


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="tars; default: the sample in CMAE_DATA, else photographs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10, help="timed batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--colors", nargs="+", default=["exact", "fast", "none"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards, data = prepare_shards(arguments.shards, Path(folder))
        measured = interleave(
            {f"{color}: {name}": run for color, name, run in build_contenders(shards, arguments)},
            rounds=arguments.rounds,
        )
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
    config |= {"data": data, "shards": len(shards), "threads": CORES, "device": DEVICE}
    write_result("loader", config=config, rows=rows)


if __name__ == "__main__":
    main()
