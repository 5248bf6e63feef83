"""Linear classifiers on kept features: many settings in one pass, chosen without the validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cmae.errors import require
from cmae.train.evaluation.schedule import cosine_schedule

TRUST = 0.001
"""LARS's coefficient in MAE's linear probe."""
DEFAULT_LRS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
DEFAULT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class ProbeData:
    """Features of one pool, float32, on the device on which the probe is trained."""

    train: Float[Tensor, "N D"]
    train_labels: Int64[Tensor, " N"]
    val: Float[Tensor, "M D"]
    val_labels: Int64[Tensor, " M"]
    num_classes: int


@dataclass(frozen=True)
class Probed:
    """One setting's accuracies, 0..1."""

    setting: float
    held_out: float
    """On the training images that its choice was made by; nan where nothing was held out."""
    accuracy: float
    """Top-1 on the validation images."""
    top5: float


@dataclass(frozen=True)
class ProbeResult:
    """All settings, and the one with the best held-out accuracy."""

    rows: list[Probed]
    chosen: Probed


def hold_out(
    num_samples: int, share: float, *, seed: int = 0
) -> tuple[Int64[Tensor, " a"], Int64[Tensor, " b"]]:
    """Rows to fit on, and rows to choose a setting by."""
    require(0 < share < 1, "share", share, "in (0, 1)")
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * num_samples))
    return order[count:].sort().values, order[:count].sort().values


def logistic_probe(
    data: ProbeData,
    *,
    decays: Sequence[float] = DEFAULT_DECAYS,
    max_iter: int = 200,
    held_out: float = 0.1,
    tell: Callable[[str], None] = lambda line: None,
) -> ProbeResult:
    """Multinomial logistic regression by L-BFGS on standardised features.

    The loss is the mean cross-entropy plus decay / 2 times the squared norm of the weights. The decay is
    chosen on a part of the training images; the classifier is then fitted to all of them.

    Args:
        data: Features and labels.
        decays: Penalties to try, > 0.
        max_iter: Most iterations of L-BFGS for each.
        held_out: Share of the training images by which the decay is chosen.
        tell: Gets a line for each decay.
    """
    mean, std = data.train.mean(0), data.train.std(0).clamp_min(1e-6)
    train, val = (data.train - mean) / std, (data.val - mean) / std
    fit, choose = (rows.to(train.device) for rows in hold_out(len(train), held_out))
    rows, start, weights = [], None, []
    for decay in sorted(decays, reverse=True):  # each begins where the one before it ended
        start = _fit_logistic(
            train[fit],
            data.train_labels[fit],
            data.num_classes,
            decay=decay,
            max_iter=max_iter,
            start=start,
        )
        scored = _top(_logits(train[choose], start), data.train_labels[choose])[0]
        accuracy, top5 = _top(_logits(val, start), data.val_labels)
        rows.append(Probed(decay, scored, accuracy, top5))
        weights.append(start)
        tell(f"decay {decay:g}: held out {scored:.2%}, validation {accuracy:.2%}")
    best = max(range(len(rows)), key=lambda index: rows[index].held_out)
    final = _fit_logistic(
        train,
        data.train_labels,
        data.num_classes,
        decay=rows[best].setting,
        max_iter=max_iter,
        start=weights[best],
    )
    accuracy, top5 = _top(_logits(val, final), data.val_labels)
    return ProbeResult(rows, Probed(rows[best].setting, rows[best].held_out, accuracy, top5))


def _fit_logistic(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    decay: float,
    max_iter: int,
    start: Tensor | None,
) -> Float[Tensor, "D+1 C"]:
    """Weights, and the bias in the last row; the bias has no penalty."""
    shape = (x.shape[1] + 1, num_classes)
    weight = torch.zeros(shape, device=x.device) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iter,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = decay / 2 * weight[:-1].square().sum()
        loss = F.cross_entropy(_logits(x, weight), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:-1] + weight[-1]


def lars_probe(
    data: ProbeData,
    *,
    lrs: Sequence[float] = DEFAULT_LRS,
    epochs: int = 90,
    warmup_epochs: float = 10.0,
    batch_size: int = 16384,
    momentum: float = 0.9,
    held_out: float = 0.1,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> ProbeResult:
    """MAE's linear probe on kept features: batch norm without affine, one layer, LARS, half a cosine.

    All learning rates are trained at the same time on the same batches. Unlike the protocol on images, the
    features are of the centre of each image, without random crops and flips.

    Args:
        data: Features and labels.
        lrs: Learning rates for 256 images; each is scaled by batch size / 256.
        epochs: Length of the schedule.
        warmup_epochs: Linear warm-up from 0.
        batch_size: Images in a step; less where there are not ten steps in an epoch.
        momentum: Momentum of LARS.
        held_out: Share of the training images by which the learning rate is chosen; they are not trained on.
        seed: Seed of the initial weights and the order of the images.
        tell: Gets a line for each learning rate.
    """
    device = data.train.device
    fit, choose = (rows.to(device) for rows in hold_out(len(data.train), held_out))
    size = max(1, min(batch_size, len(fit) // 10))
    heads = LarsHeads(
        data.train.shape[1], data.num_classes, len(lrs), momentum=momentum, seed=seed, device=device
    )
    steps = len(fit) // size
    peaks = torch.tensor(lrs, device=device) * size / 256
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        rows = fit[torch.randperm(len(fit), generator=order).to(device)]
        for step, chunk in enumerate(rows[: steps * size].split(size)):
            scale = cosine_schedule(epoch + step / steps, warmup=warmup_epochs, total=epochs)
            heads.train_step(data.train[chunk], data.train_labels[chunk], lr=peaks * scale)
    held, val = heads(data.train[choose]), heads(data.val)
    rows_of = []
    for index, lr in enumerate(lrs):
        scored = _top(held[index], data.train_labels[choose])[0]
        accuracy, top5 = _top(val[index], data.val_labels)
        rows_of.append(Probed(lr, scored, accuracy, top5))
        tell(f"lr {lr:g}: held out {scored:.2%}, validation {accuracy:.2%}")
    return ProbeResult(rows_of, max(rows_of, key=lambda row: row.held_out))


class LarsHeads:
    """Several heads (batch norm without affine, then a layer) on the same features, one learning rate each.

    The update is the one of MAE's linear probe: LARS with trust coefficient .001 for the weights, momentum
    alone for the biases, no weight decay. Initial weights are normal with deviation .01, as there.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_heads: int,
        *,
        momentum: float,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = 0.01 * torch.randn(dim, num_classes, generator=generator)
        self.weight = first.repeat(num_heads, 1, 1).to(device)
        self.bias = torch.zeros(num_heads, 1, num_classes, device=device)
        self._speed = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._norm = torch.nn.BatchNorm1d(dim, affine=False, eps=1e-6).to(device)
        self._momentum = momentum

    def __call__(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "H B C"]:
        """Logits of each head, with the running statistics."""
        self._norm.eval()
        logits: Tensor = self._norm(x) @ self.weight + self.bias
        return logits

    def train_step(self, x: Tensor, labels: Tensor, *, lr: Float[Tensor, " H"]) -> None:
        """One step of all heads on the mean cross-entropy of a batch."""
        self._norm.train()
        normed = self._norm(x)
        logits = normed @ self.weight + self.bias
        error = logits.softmax(-1)
        error[:, torch.arange(len(x), device=x.device), labels] -= 1
        error /= len(x)
        gradients = [normed.T @ error, error.sum(1, keepdim=True)]
        own, theirs = (value.flatten(1).norm(dim=1) for value in (self.weight, gradients[0]))
        trust = torch.where((own > 0) & (theirs > 0), TRUST * own / theirs, torch.ones_like(own))
        gradients[0] *= trust[:, None, None]
        for value, speed, gradient in zip(
            (self.weight, self.bias), self._speed, gradients, strict=True
        ):
            speed.mul_(self._momentum).add_(gradient)
            value.sub_(lr[:, None, None] * speed)


def _top(logits: Float[Tensor, "B C"], labels: Int64[Tensor, " B"]) -> tuple[float, float]:
    """Top-1 and top-5 accuracy."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return best[:, 0].float().mean().item(), best.any(1).float().mean().item()
