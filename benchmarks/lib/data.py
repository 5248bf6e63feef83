"""The images that a benchmark reads where no shards are named."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import webdataset as wds
from lib.results import ROOT
from PIL import Image

from cmae.pipeline import expand_shards
from cmae.train.bench.images import Data, with_indices
from cmae.train.commands.demo.data import PHOTOGRAPHS, load_photograph


def prepare_shards(pattern: str | None, folder: Path) -> Data:
    """Indexed shards; tars without an index are linked and indexed in `folder`.

    Without a pattern: the research sample in CMAE_DATA, or photographs of scikit-image where there is none.
    """
    if pattern is None:
        pattern = find_sample() or write_photographs(folder)
    return with_indices(expand_shards(pattern), folder)


def default_shards() -> str:
    """Tars for a benchmark that is given none; photographs are written to runs/photographs once."""
    found = find_sample()
    if found is not None:
        return found
    folder = ROOT / "runs"
    path = folder / "photographs" / "photographs-000000.tar"
    folder.mkdir(exist_ok=True)
    return str(path) if path.exists() else write_photographs(folder)


def find_sample() -> str | None:
    """The research sample in CMAE_DATA."""
    root = Path(os.environ.get("CMAE_DATA", ROOT.parent / "shared" / "data"))
    sample = root / "imagenet-sample"
    return str(sample / "*.tar") if sample.is_dir() else None


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
