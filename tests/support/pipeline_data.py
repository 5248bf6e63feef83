"""Small images and shards that the pipeline's tests make for themselves."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def photo(height: int = 180, width: int = 240, *, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture with some noise: JPEG and resampling treat it like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-12, 13, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray | Image.Image, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            for name, data in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_photo_shards(folder: Path, *, sizes: Iterable[int], edge: int = 64) -> list[Path]:
    """Shards of small photographs; labels count through, keys are `<shard>-<number>`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, label = [], 0
    for shard, size in enumerate(sizes):
        samples = []
        for number in range(size):
            pixels = photo(edge + number % 7, edge + shard + number % 5, seed=label)
            samples.append((f"{shard:02d}-{number:03d}", jpeg(pixels), label))
            label += 1
        paths.append(write_tar(folder / f"part-{shard:03d}.tar", samples))
    return paths


def toy_mask(sample_id: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
    """Ids that any change of sample or epoch changes."""
    first = (sample_id * 7 + epoch * 3) % 10
    ids = (first[:, None] + torch.arange(10)) % 10
    ids = ids.to(torch.int32)
    return ids[:, :4], ids[:, 4:]
