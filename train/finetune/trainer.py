"""The supervised step: augmentation of a batch, loss, update; and scoring."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmae.pipeline import Batch
from cmae.train.distributed import World
from cmae.train.evaluation.features import first_rows
from cmae.train.evaluation.schedule import cosine_schedule
from cmae.train.finetune.classifier import Classifier, build_classifier_optimizer
from cmae.train.finetune.config import FinetuneConfig
from cmae.train.finetune.rand_augment import RandAugment

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Augment:
    """What happens to a batch on the device: RandAugment, normalisation, erasing, Mixup or CutMix.

    All of it is a function of (seed, step, rank, micro-batch): a continued run draws the same.
    """

    def __init__(self, config: FinetuneConfig, num_classes: int, world: World) -> None:
        self._seed, self._rank = config.seed, world.rank
        self._rand_augment = RandAugment(config.randaugment_ops, config.randaugment_magnitude)
        self._erase = RandomErasing(
            config.random_erasing, mode="pixel", max_count=1, device=str(world.device)
        )
        self._smoothing, self._num_classes = config.label_smoothing, num_classes
        self._mix = None
        if config.mixup > 0 or config.cutmix > 0:
            self._mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                switch_prob=0.5,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, model: Classifier, batch: Batch, *, step: int, number: int
    ) -> tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "B C"]]:
        """Normalised images and soft targets of a micro-batch; seeds torch, numpy and random too."""
        sequence = np.random.SeedSequence([self._seed, step, self._rank, number])
        own, theirs = sequence.generate_state(2)
        torch.manual_seed(int(own))  # stochastic depth, noise of the erased
        np.random.seed(int(theirs))  # Mixup
        random.seed(int(theirs))  # erasing
        images: UInt8[Tensor, "B S S 3"] = batch.online
        images = self._rand_augment(images, np.random.default_rng(sequence.spawn(1)[0]))
        pixels = self._erase(model.encoder.normalise(images))
        if self._mix is not None and len(pixels) % 2 == 0:
            mixed: tuple[Tensor, Tensor] = self._mix(pixels, batch.label)
            return mixed
        target = F.one_hot(batch.label, self._num_classes).float()
        return pixels, target * (1 - self._smoothing) + self._smoothing / self._num_classes


class Trainer:
    """A classifier with its optimiser.

    Args:
        config: Settings of the run; a precision that the device has.
        model: Classifier on the world's device.
        num_classes: Width of its output.
        world: This process among all.
        steps_per_epoch: Optimiser steps.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: Classifier,
        num_classes: int,
        world: World,
        *,
        steps_per_epoch: int,
    ) -> None:
        self.config, self.model, self.world = config, model, world
        self.num_classes, self.steps_per_epoch = num_classes, steps_per_epoch
        self.total_steps = config.epochs * steps_per_epoch
        self.optimizer = build_classifier_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.augment = Augment(config, num_classes, world)
        self.ema = None if config.ema is None else ModelEmaV3(model, decay=config.ema)
        self.network: nn.Module = model
        if world.world_size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.network = DistributedDataParallel(model, device_ids=ids)
        self.grad_norm = torch.zeros(())

    def rate(self, step: int) -> float:
        """Learning rate of a step, before layer decay."""
        config = self.config
        peak = config.lr_per_256 * config.global_batch_size / 256
        share = cosine_schedule(
            step / self.steps_per_epoch,
            warmup=config.warmup_epochs,
            total=config.epochs,
            least=config.min_lr / peak if peak else 0.0,
        )
        return peak * share

    def train_step(self, batches: Sequence[Batch], step: int) -> Tensor:
        """One optimiser step on the micro-batches of a global batch; the mean loss, on the device."""
        self.network.train()
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            pixels, target = self.augment(self.model, batch, step=step, number=number)
            is_last = number == len(batches) - 1
            with self._no_sync(is_last), self._autocast():
                loss = _cross_entropy(self.network(pixels), target)
            with self._no_sync(is_last):
                self.scaler.scale(loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        self._update(self.rate(step))
        return total

    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        largest = self.config.clip_grad or float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, largest).detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.config.precision]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not torch.float32)

    def _no_sync(self, is_last: bool) -> Any:
        if is_last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()


def _cross_entropy(logits: Tensor, target: Float[Tensor, "B C"]) -> Tensor:
    return F.cross_entropy(logits.float(), target)


@dataclass(frozen=True)
class Scores:
    """How a classifier does on labelled images."""

    top1: float
    """Share, 0..1."""
    top5: float
    loss: float
    """Mean cross-entropy."""
    num_images: int
    confusion: Int64[Tensor, "C C"]
    """Counts: row the class, column the answer."""

    @property
    def per_class(self) -> Float[Tensor, " C"]:
        """Top-1 of each class; nan where it has no image."""
        counts = self.confusion.sum(1)
        return self.confusion.diagonal() / counts.where(counts > 0, torch.nan)


@torch.no_grad()
def score(
    model: Classifier,
    batches: Iterable[Batch],
    *,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """What `summarise` counts, of each image; those that come twice (padding) are in it twice.

    Args:
        model: Classifier on the batches' device.
        batches: Images with labels in 0..C-1.
        precision: 'fp16', 'bf16' or 'fp32'.

    Returns:
        'ids', 'rank' (place of the label among the answers, 0 is right), 'answer', 'label' and 'loss', one a
        image, on the CPU.
    """
    was_training = model.training
    model.eval()
    dtype = _DTYPES[precision]
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("ids", "rank", "answer", "label", "loss")
    }
    for batch in batches:
        device = batch.online.device
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            logits = model.classify(batch.online).float()
        own = logits.gather(1, batch.label[:, None])
        values = {
            "ids": batch.sample_id,
            "rank": (logits > own).sum(1),
            "answer": logits.argmax(1),
            "label": batch.label,
            "loss": F.cross_entropy(logits, batch.label, reduction="none"),
        }
        for name, value in values.items():
            parts[name].append(value.cpu())
    model.train(was_training)
    return {name: torch.cat(values) for name, values in parts.items()}


def summarise(parts: Sequence[dict[str, Tensor]], num_classes: int, *, total: int) -> Scores:
    """Scores from what `score` gave on every rank; each image counts once.

    Args:
        parts: One of each rank.
        num_classes: Classes of the confusion table.
        total: Images in the data set.
    """
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rows = first_rows(joined["ids"], total)
    rank, label, answer = (joined[name][rows] for name in ("rank", "label", "answer"))
    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    table.index_put_((label, answer), torch.ones_like(label), accumulate=True)
    return Scores(
        top1=(rank == 0).double().mean().item(),
        top5=(rank < 5).double().mean().item(),
        loss=joined["loss"][rows].double().mean().item(),
        num_images=len(rows),
        confusion=table,
    )
