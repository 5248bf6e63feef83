"""Parameters and multiply-adds of a configuration, counted without building weights."""

from __future__ import annotations

import torch

from cmae.model.analysis.operations import Precision, operations
from cmae.model.cmae import CMAE
from cmae.model.config import ModelConfig

_ONLINE = ("encoder", "pixel_decoder", "feature_decoder", "projector", "predictor")
_TARGET = ("target_encoder", "target_projector")


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part, their sum over the online parts and over the target parts.

    As published counts do, the encoder's number includes its fixed position embedding, which timm
    stores as a parameter; the decoders' tables are buffers and not counted. Parts that are off
    count 0.

    Returns:
        Keys encoder, pixel_decoder, feature_decoder, projector, predictor, online,
        target_encoder, target_projector, target.
    """
    with torch.device("meta"):
        model = CMAE(config)
    counts = dict.fromkeys((*_ONLINE, *_TARGET), 0)
    for name, part in model.named_children():
        counts[name] = sum(parameter.numel() for parameter in part.parameters())
    counts["online"] = sum(counts[name] for name in _ONLINE)
    counts["target"] = sum(counts[name] for name in _TARGET)
    return counts


def count_multiply_adds(config: ModelConfig, *, as_published: bool = True) -> dict[str, int]:
    """Multiply-adds per image of each part's forward pass, and of a training step.

    Linear layers, convolutions and both products of attention; norms, activations, softmax and the losses
    are not counted.

    Args:
        config: Model to count.
        as_published: Whether to count as papers do: every patch is embedded and every decoder token
            passes every layer, embedding included (use it for the utilisation of a GPU, so that skipping
            work does not look like slowness); else what this code runs.

    Returns:
        Keys encoder, pixel_decoder, feature_decoder, heads (projector and predictor), target (its encoder
        and projector), and training_step: 3 times the online parts (a backward pass costs two forward
        passes) plus the target.
    """
    counts = dict.fromkeys(("encoder", "pixel_decoder", "feature_decoder", "heads", "target"), 0)
    step = 0.0
    for one in operations(config, Precision(), num_keys=1, as_published=as_published):
        if one.part != "losses":
            counts[one.part.replace(" ", "_")] += int(one.flops / 2)
            step += (one.flops + one.backward_flops) / 2
    return {**counts, "training_step": int(step)}
