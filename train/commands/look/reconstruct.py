"""`cmae reconstruct`: original, masked input and reconstruction of image files."""

from __future__ import annotations

from pathlib import Path

import torch

from cmae.model import draw_mask, load_model
from cmae.paths import check_output
from cmae.train.monitor.console import PlainConsole
from cmae.train.monitor.images import draw_reconstructions, load_square


def reconstruct(
    checkpoint: Path, images: list[Path], out: Path = Path("reconstruction.png"), seed: int = 0
) -> int:
    """Draw original, masked input and reconstruction of image files.

    Args:
        checkpoint: Checkpoint of this project, or made by `cmae import`.
        images: Image files, one or more; the centre square of each is used.
        out: PNG to write.
        seed: Seed of the mask.
    """
    check_output(out, key="--out", suffixes=(".png",))
    model = load_model(checkpoint)
    online = torch.stack([load_square(path, model.config.img_size) for path in images])
    ids_keep, _ = draw_mask(model.config, torch.arange(len(images)), seed=seed, epoch=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(model, online, ids_keep, out)
    PlainConsole(stderr=True).print(f"{out}: {len(images)} images", soft_wrap=True)
    return 0
