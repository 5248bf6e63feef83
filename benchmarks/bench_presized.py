"""What do pre-resized shards save, and what do they cost in pixels?

    python benchmarks/bench_presized.py --sizes 512 400

Writes shards of the same images with `cmae shards write --max-size` and compares, for every image that was
touched, the 256 px masters of the same relative windows: mean absolute error in levels and PSNR against the
masters of the original file. Windows are drawn as a run draws them and cut at fractions of a pixel, so that
rounding them to another grid is not counted. The loader's rates: `cmae bench loader --presized '[512]'`.

Predictions, written before the first run: at 512 px one image in ten is touched and the error is below 1
level; at 400 px, one in four and 1.5 levels.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lib.data import prepare_shards
from lib.results import write_result
from PIL import Image

from cmae.pipeline import ViewConfig, draw_view_params
from cmae.pipeline.formats.presized import downscale_mark
from cmae.pipeline.formats.shard_index import load_index
from cmae.train.bench.harness import summarise
from cmae.train.bench.images import image_places, read_image, unpack_images, write_presized

WINDOWS = 4
"""Windows compared for each image."""


def compare(images: Path, shards: list[str]) -> list[dict[str, float]]:
    """Bytes, pixels and errors of each touched image; the key of a sample is its file's name."""
    rows = []
    for shard in shards:
        for key, place in zip(load_index(shard).keys, image_places([shard]), strict=True):
            small = read_image(place)
            if downscale_mark(small):
                original = (images / f"{key}.jpg").read_bytes()
                rows.append(compare_image(original, small, seed=len(rows)))
    return rows


def compare_image(original: bytes, small: bytes, *, seed: int) -> dict[str, float]:
    """Both files' masters of the same relative windows."""
    before, after = (Image.open(io.BytesIO(data)).convert("RGB") for data in (original, small))
    views = ViewConfig()
    params = draw_view_params(
        views,
        seed=seed,
        epoch=0,
        sample_id=np.arange(WINDOWS),
        height=np.full(WINDOWS, before.height),
        width=np.full(WINDOWS, before.width),
    )
    scale = np.array([after.height / before.height, after.width / before.width] * 2)
    errors = [
        _master(after, crop * scale, views.source_crop_size)
        - _master(before, crop, views.source_crop_size)
        for crop in params.crop
    ]
    return {
        "bytes": len(original),
        "presized_bytes": len(small),
        "mean_error_levels": float(np.mean(np.abs(errors))),
        "psnr_db": float(10 * np.log10(255**2 / max(np.mean(np.square(errors)), 1e-9))),
    }


def _master(image: Image.Image, crop: np.ndarray, side: int) -> np.ndarray:
    top, left, height, width = crop
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box), np.float32)


def measure_size(
    max_size: int, images: Path, folder: Path, total: dict[str, int]
) -> dict[str, Any]:
    """One row of the result file."""
    start = time.process_time()
    shards = write_presized(images, folder, max_size=max_size)
    write_s = time.process_time() - start
    places = list(image_places(shards))
    touched = compare(images, shards)
    return {
        "max_size": max_size,
        "images": len(places),
        "touched": len(touched),
        "bytes_of_original": sum(place.num_bytes for place in places) / total["bytes"],
        "pixels_of_original": sum(place.height * place.width for place in places) / total["pixels"],
        "mean_error_levels": summarise([row["mean_error_levels"] for row in touched]),
        "psnr_db": summarise([row["psnr_db"] for row in touched]),
        "write_cpu_ms_per_touched_image": 1000 * write_s / max(len(touched), 1),
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="tars; default: the sample in CMAE_DATA, else photographs")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 400])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_shards(arguments.shards, folder)
        places = list(image_places(data.shards))
        total = {
            "bytes": sum(place.num_bytes for place in places),
            "pixels": sum(place.height * place.width for place in places),
        }
        images = unpack_images(data.shards, folder)
        rows = [measure_size(size, images, folder, total) for size in arguments.sizes]
    for row in rows:
        error, psnr = row["mean_error_levels"], row["psnr_db"]
        print(
            f"{row['max_size']} px: {row['touched']} of {row['images']} images touched, "
            f"{row['bytes_of_original']:.1%} of the bytes, {row['pixels_of_original']:.1%} of the pixels, "
            f"error {error['median']:.2f} levels (worst {error['max']:.2f}), PSNR {psnr['median']:.1f} dB "
            f"(worst {psnr['min']:.1f}), {row['write_cpu_ms_per_touched_image']:.0f} CPU-ms each"
        )
    config = {"sizes": arguments.sizes, "data": data.description, "windows": WINDOWS}
    write_result("presized", config=config, rows=rows)


if __name__ == "__main__":
    main()
