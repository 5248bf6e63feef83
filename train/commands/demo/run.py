"""`cmae demo`: the whole way from photographs to a pretrained encoder, in minutes, on two CPU cores.

The task: from which of 16 photographs does a tile come? Training and validation tiles come from disjoint
regions, so a tile is recognised by what its photograph looks like, not by pixels seen before. Labels serve
for scoring only: weighted k-NN (k 20, temperature .07, cosine) against the training tiles, and logistic
regression, on the mean patch token of the whole, unmasked tile of

- the encoder that CMAE pretrained,
- one that MAE pretrained on the same tiles as long, with the mask ratio and learning rate best for it,
- one with its initial weights,

and on the pixels of the tile, at the size that the network sees. All tiles have the same mean colour and
contrast, or these alone would give most photographs away. The demo succeeds if CMAE is ahead of all others,
MAE too, by `MARGIN` of k-NN accuracy: what reconstruction alone does not reach.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from cmae.model import CMAE, build_model, draw_mask, load_model
from cmae.model.export.stored import list_checkpoints
from cmae.train.commands.demo.data import PHOTOGRAPHS, TILE_MEAN, TILE_STD, write_demo_shards
from cmae.train.config_parser import load_recipe
from cmae.train.evaluation.knn import EvalImages, extract_features, knn_accuracy, load_eval_images
from cmae.train.evaluation.probes import ProbeData, logistic_probe
from cmae.train.loop.pretrain import pretrain
from cmae.train.monitor.console import PlainConsole, labelled
from cmae.train.monitor.images import draw_reconstructions

MARGIN = 0.03
"""By how much CMAE's k-NN accuracy must exceed every other; docs/results/demo.md has five seeds."""
MAE = {
    "run.bands": "",
    "model.contrastive_loss": "none",
    "model.mask_ratio": "0.75",
    "optim.lr_per_256": "4.0e-3",
}
"""What makes MAE of the recipe; of 4e-3, 8e-3 and 1.6e-2 the learning rate with the best linear probe."""
DECAYS = ((1e-4, 1e-3, 1e-2), (1e-1, 1.0))
"""Penalties of the probe: on features, and on thousands of pixels, where the small ones take minutes."""
Accuracies = dict[str, tuple[float, float]]
"""k-NN and linear probe, 0..1, by kind of feature."""


def demo(out: Path = Path("runs/demo"), seed: int = 0) -> int:
    """Pretrain a micro CMAE on tiles of real photographs and score it beside MAE and untrained baselines.

    Exits with 0 if its k-NN accuracy is 3 points above those of MAE and of both baselines, else with 1.
    Run it again after an interruption and it continues; delete the folder to start afresh.

    Args:
        out: Folder for tiles, shards, checkpoints, metrics and images.
        seed: Seed of the weights, the order of the data, the views and the masks.
    """
    console = PlainConsole()
    title = f"1. Cut {len(PHOTOGRAPHS)} photographs into tiles, write WebDataset shards"
    with _stage(console, title):
        counts = write_demo_shards(out)
        console.print(
            f"   {counts.train} training and {counts.val} validation tiles from disjoint regions"
        )
    settings = {
        "data.shards": str(out / "shards" / "train"),
        "run.eval_shards": str(out / "shards" / "val"),
        "run.out": str(out),
        "seed": str(seed),
    }
    if torch.cuda.is_available():
        settings["optim.precision"] = "fp16"
    with _stage(console, "2. Pretrain CMAE without labels, on the code path of every run:"):
        code = _pretrain(console, settings)
    if code:
        return code
    with _stage(console, "3. Pretrain MAE on the same tiles, to compare with:"):
        code = _pretrain(console, {**settings, **MAE, "run.out": str(out / "mae")})
    if code:
        return code
    config = load_recipe("demo", overrides=settings)
    with _stage(console, "4. Score frozen features by k nearest neighbours, draw reconstructions"):
        train, val = (
            load_eval_images(str(out / "shards" / split), config.model.img_size)
            for split in ("train", "val")
        )
        model = load_model(list_checkpoints(out / "checkpoints")[-1])
        mae = load_model(list_checkpoints(out / "mae" / "checkpoints")[-1])
        accuracies = _score(model, mae, build_model(config.model, seed=seed), train, val)
        _draw(model, val, out / "reconstruction.png", seed)
    _print_table(console, accuracies)
    return conclude(console, accuracies, out)


def _pretrain(console: PlainConsole, settings: dict[str, str]) -> int:
    """Print the command that does the same, and run it; the exit code."""
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    console.print(f"   cmae pretrain --recipe demo {shlex.join(options)}", soft_wrap=True)
    return pretrain(load_recipe("demo", overrides=settings)).exit_code


def _score(
    cmae: CMAE, mae: CMAE, untrained: CMAE, train: EvalImages, val: EvalImages
) -> Accuracies:
    """Accuracies of each kind of feature; CMAE's come first."""
    features: dict[str, Callable[[Tensor], Tensor]] = {
        "CMAE": lambda images: extract_features(cmae, images),
        "MAE": lambda images: extract_features(mae, images),
        "encoder with random weights": lambda images: extract_features(untrained, images),
        "pixels": lambda images: (images.flatten(1) - TILE_MEAN) / TILE_STD,
    }
    found: Accuracies = {}
    for name, compute in features.items():
        known, asked = compute(train.images), compute(val.images)
        count = len(PHOTOGRAPHS)
        knn = knn_accuracy(known, train.labels, asked, val.labels, num_classes=count)
        data = ProbeData(known, train.labels, asked, val.labels, count)
        found[name] = (
            knn,
            logistic_probe(data, decays=DECAYS[len(known[0]) > 1000]).chosen.accuracy,
        )
    return found


def _draw(model: CMAE, val: EvalImages, path: Path, seed: int) -> None:
    """Reconstruct one validation tile of each photograph."""
    chosen = torch.stack([(val.labels == label).nonzero()[0, 0] for label in val.labels.unique()])
    ids_keep, _ = draw_mask(model.config, chosen, seed=seed, epoch=0)
    draw_reconstructions(model, val.images[chosen], ids_keep, path)


def _print_table(console: PlainConsole, accuracies: Accuracies) -> None:
    table = Table(title="\nFrom which photograph is this tile?", title_justify="left")
    table.add_column("features")
    for name in ("k-NN accuracy", "linear probe", "CMAE is ahead by (k-NN)"):
        table.add_column(name, justify="right")
    (first, (best, linear)), *others = accuracies.items()
    table.add_row(first, f"{best:.1%}", f"{linear:.1%}", "", style="bold")
    for name, (knn, linear) in others:
        ahead = f"{100 * (best - knn):+.1f} points"
        table.add_row(name, f"{knn:.1%}", f"{linear:.1%}", ahead)
    chance = f"{1 / len(PHOTOGRAPHS):.1%}"
    table.add_row("chance", chance, chance, "", style="dim")
    console.print(table)


def conclude(console: PlainConsole, accuracies: Accuracies, out: Path) -> int:
    """Print what lies where and whether the run learnt anything; the exit code."""
    for name, what in {
        "reconstruction.png": "original, masked input, reconstruction of validation tiles",
        "first_batch.png": "what the network was shown in its first step",
        "loss.png": "losses, accuracies on the way, learning rate, speed; shaded: what is expected",
        "metrics.jsonl": "the same as numbers; also: tensorboard --logdir " + str(out),
        "checkpoints": "weights, optimiser, place in the data",
        "mae": "the same of MAE",
    }.items():
        console.print(f"{out / name!s:<32} {what}", soft_wrap=True)
    cmae, *others = (knn for knn, _ in accuracies.values())
    margin = cmae - max(others)
    passed = margin >= MARGIN
    verdict, style = ("PASS", "bold green") if passed else ("FAIL", "bold red")
    console.print()
    console.print(
        labelled(
            verdict,
            f"CMAE's k-NN accuracy is {100 * margin:.1f} points above the best of the others, MAE among them "
            f"(asked for: {100 * MARGIN:.0f})",
            style,
        )
    )
    return 0 if passed else 1


@contextmanager
def _stage(console: PlainConsole, title: str) -> Iterator[None]:
    console.print(f"\n{title}", style="bold", soft_wrap=True)
    start = time.perf_counter()
    yield
    console.print(f"   {time.perf_counter() - start:.0f} s", style="dim", soft_wrap=True)
