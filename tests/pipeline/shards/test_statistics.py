from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.shard_data import tars, write

from cmae.pipeline.shards.contact_sheet import contact_sheet
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.statistics import shard_statistics
from cmae.pipeline.shards.write import write_shards


def test_statistics_are_those_of_the_images(images: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (100, 50)).save(images / "bee" / "grey.jpg", exif=exif)
    out = tmp_path / "out"
    write(images, out)
    facts = shard_statistics(tars(out))
    sizes = [path.stat().st_size for path in images.rglob("*.*")]
    assert facts.num_samples == len(sizes) == 25
    assert facts.samples_per_shard == (5, 5)
    assert facts.image_bytes == sum(sizes)
    assert facts.bytes_at[0] == min(sizes)
    assert facts.bytes_at[-1] == max(sizes)
    assert facts.width_at[-1] == 100
    assert facts.megapixels_at[3] == pytest.approx(40 * 30 / 1e6)
    assert facts.kinds == {"baseline": 24, "grayscale": 1}
    assert facts.orientations == {1: 24, 6: 1}
    assert facts.class_counts == {0: 8, 1: 9, 2: 8}
    assert (facts.num_unlabelled, facts.num_bad) == (0, 0)


def test_the_contact_sheet_shows_the_images_in_order(tmp_path: Path) -> None:
    colours = [(200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20), (20, 200, 200)]
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.new("RGB", (90, 60), colour).save(root / f"{i}.jpg", quality=95)
    source = scan_image_folder(root.parent)
    write_shards(source, tmp_path / "out", shuffle=False, samples_per_shard=2)
    path = contact_sheet(
        tars(tmp_path / "out"), tmp_path / "sheet.png", num_images=10, columns=3, cell_px=64
    )
    with Image.open(path) as sheet:
        gap = 4
        step = (sheet.width - gap) // 3
        line = (sheet.height - gap) // 2
        seen = [
            sheet.getpixel((gap + (i % 3) * step + 32, gap + (i // 3) * line + 32))
            for i in range(5)
        ]
    np.testing.assert_allclose(seen, colours, atol=6)
