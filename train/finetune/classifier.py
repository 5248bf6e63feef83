"""An encoder with a head: what is trained of it, and at which learning rate.

Parameter groups, layer decay and initial values are those of MAE's public fine-tuning and linear probe, as
facts; the tests hold them number by number.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from timm.optim.lars import Lars
from torch import Tensor, nn

from cmae.errors import CmaeError
from cmae.model.hybrid import HybridEncoder
from cmae.train.evaluation.encoders import Encoder
from cmae.train.finetune.config import FinetuneConfig

HEAD_STD = {"norm": 2e-5, "batch_norm": 0.01}
"""Deviation of the last layer's initial weights."""


class Classifier(nn.Module):
    """Pooled tokens of an encoder, a norm, and a linear layer.

    Args:
        encoder: Its own final norm is taken away where the head has one of its own. A hybrid encoder no
            longer adds its stages' features to the tokens, as in ConvMAE's fine-tuning and linear probe.
        num_classes: Width of the output.
        pool: 'mean' of the patch tokens, or 'cls'.
        head: 'norm' for a LayerNorm, 'batch_norm' for a batch norm without affine after the encoder's own
            final norm.
        blocks: Number of last blocks to train, see `FinetuneConfig.blocks`.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        *,
        pool: Literal["mean", "cls"] = "mean",
        head: Literal["norm", "batch_norm"] = "norm",
        blocks: float | None = None,
    ) -> None:
        super().__init__()
        vit = encoder.vit
        assert isinstance(vit, VisionTransformer | HybridEncoder)
        if isinstance(vit, HybridEncoder):
            vit.drop_features()
            vit.pos_embed.requires_grad_(True)
        if pool == "cls" and not encoder.has_cls:
            raise CmaeError(f"{encoder.name} has no cls token: take pool=mean")
        self.encoder, self.pool = encoder, pool
        width = int(vit.embed_dim)
        self.norm: nn.Module
        if head == "norm":
            vit.norm = nn.Identity()
            self.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.fc = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=HEAD_STD[head])
        nn.init.zeros_(self.fc.bias)
        freeze(vit, blocks)
        self._is_frozen = blocks == 0

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C"]:
        """Logits of normalised images."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_frozen):
            tokens = self.encoder.vit.forward_features(pixels)  # type: ignore[operator]
        prefix = self.encoder.vit.num_prefix_tokens
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, prefix:].mean(1)
        logits: Tensor = self.fc(self.norm(pooled))
        return logits

    def classify(self, images: UInt8[Tensor, "B S S 3"]) -> Float[Tensor, "B C"]:
        """Logits of images as a loader gives them."""
        logits: Tensor = self(self.encoder.normalise(images))
        return logits


def freeze(vit: VisionTransformer | HybridEncoder, blocks: float | None) -> None:
    """Leave only the last blocks to the optimiser; 0.5 is the MLP of the last one. None: everything.

    Raises:
        CmaeError: The encoder has fewer blocks.
    """
    if blocks is None:
        return
    if blocks > len(vit.blocks):
        raise CmaeError(f"blocks is {blocks:g}, and the encoder has {len(vit.blocks)}: take fewer")
    vit.requires_grad_(False)
    trained: list[nn.Module] = []
    if blocks == 0.5:
        last: Any = vit.blocks[-1]
        trained = [last.norm2, last.mlp]
    elif blocks:
        trained = list(vit.blocks[-int(blocks) :])
    if blocks:
        trained.append(vit.norm)
    for module in trained:
        module.requires_grad_(True)


def layer_of(name: str, depth: int) -> int:
    """Place for layer decay: 0 for embeddings and stages, 1.. for blocks, depth + 1 for the head."""
    inner = name.removeprefix("encoder.vit.")
    if inner == name:
        return depth + 1
    if inner.startswith("blocks."):
        return int(inner.split(".")[1]) + 1
    return depth + 1 if inner.startswith(("norm.", "fc_norm.")) else 0


def parameter_groups(
    model: Classifier, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups by layer and weight decay; 'lr_scale' is what layer decay leaves of the learning rate.

    Vectors, biases, the cls token and position embeddings have no weight decay.
    """
    depth = model.encoder.depth
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decays = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token", "reg_token"))
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_classifier_optimizer(model: Classifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW with layer decay, or LARS as in MAE's linear probe: trust for weights, none for vectors."""
    groups = parameter_groups(
        model, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr_per_256, betas=(0.9, 0.999))
    parts = []
    for group in groups:
        for is_vector in (False, True):
            own = [p for p in group["params"] if (p.ndim <= 1) == is_vector]
            if own:
                trust = {"weight_decay": 0.0, "always_adapt": False} if is_vector else {}
                parts.append({"always_adapt": True, **group, "params": own, **trust})
    return Lars(parts, lr=config.lr_per_256, momentum=0.9, trust_coeff=0.001)
