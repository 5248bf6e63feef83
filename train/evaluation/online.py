"""Evaluation while a run goes on: k-NN, a linear probe and statistics of both encoders on a few images.

All ranks compute features of their share and the first one scores them. It runs in the training thread,
between two steps; what that costs is measured and told (`eval_s`, `eval_pct`).
"""

from __future__ import annotations

import time
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from cmae.errors import CmaeError
from cmae.model import CMAE
from cmae.model.blocks import unpinned
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.train.config import Config
from cmae.train.distributed import World, gather_values
from cmae.train.evaluation.features import Images, open_images
from cmae.train.evaluation.knn import knn_accuracy
from cmae.train.evaluation.probes import hold_out
from cmae.train.evaluation.statistics import alignment, rank_me, spectrum_slope, uniformity

QUERY_EVERY = 5
"""Every fifth image is asked about; the others are the bank."""
_RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class OnlineEvaluation:
    """Holds the images, uint8 in host memory, and scores a model on them. A collective.

    Args:
        config: Configuration of the run, with `run.eval_shards`.
        world: This process among all.

    Raises:
        CmaeError: No such shards, or images without labels.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._world = world
        self._dtype = _DTYPES[config.optim.precision]
        images = Images(
            config.run.eval_shards,
            config.model.img_size,
            config.run.eval_centre_share,
        )
        self._images, self._labels, self._ids = _read(images, config.run.eval_samples, world)
        self._started = time.perf_counter()
        self._spent = 0.0

    def __call__(self, model: CMAE) -> dict[str, float]:
        """Scores of the online and the target encoder, by metric; {} on other ranks than the first.

        k-NN: k 20, temperature .07; linear: ridge regression onto the classes. Both on mean patch tokens.
        """
        started = time.perf_counter()
        encoders = {"online": model.encoder, "target": model.target_encoder}
        found: dict[str, float] = {}
        was_training = model.training
        model.eval()
        # A compiled block would be compiled again for these shapes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), unpinned(model):
            for name, encoder in encoders.items():
                if encoder is not None:
                    scores = self._score(encoder, model.config.num_prefix_tokens)
                    found |= {f"{metric}_{name}": value for metric, value in scores.items()}
        model.train(was_training)
        now = time.perf_counter()
        self._spent += now - started
        found["eval_s"] = now - started
        found["eval_pct"] = 100 * self._spent / max(1e-9, now - self._started)
        return found if self._world.is_main else {}

    def _score(self, encoder: nn.Module, prefix: int) -> dict[str, float]:
        own = self._features(encoder, self._images, prefix)
        queries = self._images[::QUERY_EVERY][:512]
        flipped = self._features(encoder, queries.flip(2), prefix)
        parts = gather_values((own, self._labels, self._ids, flipped), self._world)
        if not self._world.is_main:
            return {}
        features, labels, ids = (torch.cat([part[i] for part in parts]) for i in range(3))
        order = ids.argsort(stable=True)
        features, labels = features[order], labels[order]
        device = self._world.device
        scores = _supervised(features.to(device), labels.to(device))
        scores["rankme"] = rank_me(features.to(device))
        scores["spectrum_slope"] = spectrum_slope(features.to(device))
        first = torch.cat([part[0][::QUERY_EVERY][:512] for part in parts])
        scores["alignment"] = alignment(first, torch.cat([part[3] for part in parts]))
        scores["uniformity"] = uniformity(features.to(device))
        return scores

    def _features(
        self, encoder: nn.Module, images: UInt8[Tensor, "N S S 3"], prefix: int
    ) -> Float[Tensor, "N D"]:
        device, parts = self._world.device, []
        is_half = self._dtype is not torch.float32
        for chunk in images.split(128):
            with torch.autocast(device.type, self._dtype, enabled=is_half):
                tokens = encoder(chunk.to(device))
            parts.append(tokens[:, prefix:].mean(1).float().cpu())
        return torch.cat(parts)


def _supervised(features: Float[Tensor, "N D"], labels: Int64[Tensor, " N"]) -> dict[str, float]:
    """k-NN and ridge accuracy of every fifth image, the others being known."""
    is_query = torch.arange(len(labels), device=labels.device) % QUERY_EVERY == 0
    bank, queries = features[~is_query], features[is_query]
    known, asked = labels[~is_query], labels[is_query]
    count = int(labels.max()) + 1
    knn = knn_accuracy(bank, known, queries, asked, num_classes=count, k=min(20, len(bank)))
    return {"knn": knn, "linear": ridge_accuracy(bank, known, queries, asked, num_classes=count)}


def ridge_accuracy(
    train: Float[Tensor, "N D"],
    train_labels: Int64[Tensor, " N"],
    val: Float[Tensor, "M D"],
    val_labels: Int64[Tensor, " M"],
    *,
    num_classes: int,
) -> float:
    """Accuracy of ridge regression onto one-hot classes, in closed form; the penalty is chosen on a tenth."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    x, y = ((part - mean) / std for part in (train, val))
    targets = F.one_hot(train_labels, num_classes).float()
    fit, choose = (rows.to(train.device) for rows in hold_out(len(train), 0.1))

    def solve(rows: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        part, wanted = x[rows], targets[rows]
        centre = wanted.mean(0)
        gram = part.T @ part + penalty * torch.eye(part.shape[1], device=part.device)
        return torch.linalg.solve(gram, part.T @ (wanted - centre)), centre

    def accuracy(weights: tuple[Tensor, Tensor], inputs: Tensor, labels: Tensor) -> float:
        answers = (inputs @ weights[0] + weights[1]).argmax(1)
        return (answers == labels).float().mean().item()

    best = max(
        _RIDGES, key=lambda penalty: accuracy(solve(fit, penalty), x[choose], train_labels[choose])
    )
    everything = torch.arange(len(train), device=train.device)
    return accuracy(solve(everything, best), y, val_labels)


def _read(images: Images, most: int, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the images, spread evenly over the data set, with labels and ids."""
    kept: list[tuple[Tensor, ...]] = []
    seen: set[int] = set()
    with open_images(images, batch_size=64, world=world) as loader:
        steps, size = loader.steps_per_epoch or 0, loader.num_samples or 0
        stride, count = max(1, size // most), 0
        for batch in islice(loader, steps):
            rows = []
            for row, one in enumerate(batch.sample_id.tolist()):
                if (count + row) % stride == 0 and one not in seen:  # padding comes twice
                    seen.add(one)
                    rows.append(row)
            count += len(batch.label)
            parts = (batch.online, batch.label, batch.sample_id)
            kept.append(tuple(part[rows].cpu() for part in parts))
    pixels, labels, ids = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if (labels == NO_LABEL).any():
        raise CmaeError(
            "run.eval_shards: some images have no label; it needs a `.cls` file beside each"
        )
    return pixels, labels, ids
