"""`cmae demo`: the whole way from photographs to a pretrained encoder, in minutes, on two CPU cores.

The task: from which of 16 photographs does a tile come? Training and validation tiles come from disjoint
regions, so a tile is recognised by what its photograph looks like, not by pixels seen before. Labels serve
for scoring only: weighted k-NN (k 20, temperature .07, cosine) against the training tiles, the same for

- the pretrained encoder: mean patch token of the whole, unmasked tile,
- the encoder with its initial weights,
- the pixels of the tile, at the size that the network sees.

A transformer with random weights is not bad at texture: it is the baseline that counts. All tiles have the
same mean colour and contrast, or these alone would give most photographs away. The demo succeeds if
pretraining beats both baselines by `MARGIN`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.table import Table

from cmae.model import CMAE, build_model, draw_mask, load_model
from cmae.model.export.stored import list_checkpoints
from cmae.train.commands.demo.data import PHOTOGRAPHS, TILE_MEAN, TILE_STD, write_demo_shards
from cmae.train.config_parser import load_recipe
from cmae.train.evaluation.knn import EvalImages, extract_features, knn_accuracy, load_eval_images
from cmae.train.loop.pretrain import pretrain
from cmae.train.monitor.console import PlainConsole, labelled
from cmae.train.monitor.images import draw_reconstructions

MARGIN = 0.10
"""By how much the accuracy must exceed that of both baselines; three seeds were 15 to 19 points ahead."""


def demo(out: Path = Path("runs/demo"), seed: int = 0) -> int:
    """Pretrain a micro CMAE on tiles of real photographs and score it against untrained baselines.

    Exits with 0 if the pretrained encoder beats both baselines by 10 points of k-NN accuracy, else with 1.
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
        "run.out": str(out),
        "seed": str(seed),
    }
    if torch.cuda.is_available():
        settings["optim.precision"] = "fp16"
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    with _stage(console, "2. Pretrain without labels, on the code path of every run:"):
        console.print(f"   cmae pretrain --recipe demo {shlex.join(options)}", soft_wrap=True)
        config = load_recipe("demo", overrides=settings)
        outcome = pretrain(config)
    if outcome.exit_code:
        return outcome.exit_code
    with _stage(console, "3. Score frozen features by k nearest neighbours, draw reconstructions"):
        train, val = (
            load_eval_images(str(out / "shards" / split), config.model.img_size)
            for split in ("train", "val")
        )
        model = load_model(list_checkpoints(out / "checkpoints")[-1])
        accuracies = _score(model, build_model(config.model, seed=seed), train, val)
        _draw(model, val, out / "reconstruction.png", seed)
    _print_table(console, accuracies)
    return conclude(console, accuracies, out)


def _score(
    pretrained: CMAE, untrained: CMAE, train: EvalImages, val: EvalImages
) -> dict[str, float]:
    """k-NN accuracy of each kind of feature; the pretrained encoder's comes first."""
    features = {
        "pretrained encoder": lambda images: extract_features(pretrained, images),
        "encoder with random weights": lambda images: extract_features(untrained, images),
        "pixels": lambda images: (images.flatten(1) - TILE_MEAN) / TILE_STD,
    }
    return {
        name: knn_accuracy(
            compute(train.images),
            train.labels,
            compute(val.images),
            val.labels,
            num_classes=len(PHOTOGRAPHS),
        )
        for name, compute in features.items()
    }


def _draw(model: CMAE, val: EvalImages, path: Path, seed: int) -> None:
    """Reconstruct one validation tile of each photograph."""
    chosen = torch.stack([(val.labels == label).nonzero()[0, 0] for label in val.labels.unique()])
    ids_keep, _ = draw_mask(model.config, chosen, seed=seed, epoch=0)
    draw_reconstructions(model, val.images[chosen], ids_keep, path)


def _print_table(console: PlainConsole, accuracies: dict[str, float]) -> None:
    table = Table(title="\nFrom which photograph is this tile?", title_justify="left")
    table.add_column("features")
    table.add_column("k-NN accuracy", justify="right")
    table.add_column("pretraining is ahead by", justify="right")
    (first, best), *baselines = accuracies.items()
    table.add_row(first, f"{best:.1%}", "", style="bold")
    for name, accuracy in baselines:
        table.add_row(name, f"{accuracy:.1%}", f"{100 * (best - accuracy):+.1f} points")
    table.add_row("chance", f"{1 / len(PHOTOGRAPHS):.1%}", "", style="dim")
    console.print(table)


def conclude(console: PlainConsole, accuracies: dict[str, float], out: Path) -> int:
    """Print what lies where and whether the run learnt anything; the exit code."""
    for name, what in {
        "reconstruction.png": "original, masked input, reconstruction of validation tiles",
        "first_batch.png": "what the network was shown in its first step",
        "loss.png": "losses, learning rate, speed",
        "metrics.jsonl": "the same as numbers; also: tensorboard --logdir " + str(out),
        "checkpoints": "weights, optimiser, place in the data",
    }.items():
        console.print(f"{out / name!s:<32} {what}", soft_wrap=True)
    pretrained, *baselines = accuracies.values()
    margin = pretrained - max(baselines)
    passed = margin >= MARGIN
    verdict, style = ("PASS", "bold green") if passed else ("FAIL", "bold red")
    console.print()
    console.print(
        labelled(
            verdict,
            f"pretraining is {100 * margin:.1f} points ahead of the best baseline "
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
