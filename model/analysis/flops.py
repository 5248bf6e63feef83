"""Parameters and multiply-adds of a configuration, counted without building weights."""

from __future__ import annotations

import torch

from cmae.model.cmae import CMAE
from cmae.model.config import ModelConfig
from cmae.model.hybrid import CONV_DEPTH, FIRST_STRIDE, stage_dims

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


def count_multiply_adds(config: ModelConfig, *, exact_cuts: bool = False) -> dict[str, int]:
    """Multiply-adds per image of each part's forward pass, and of a training step.

    Linear layers, convolutions and both products of attention; norms, activations and softmax
    are not counted.

    Args:
        config: what to count.
        exact_cuts: False counts the method as published: every patch is embedded and every
            decoder token passes every layer, embedding included (use it for the utilisation of a
            GPU, so that skipping work does not look like slowness). True counts what this code
            runs.

    Returns:
        Keys encoder, pixel_decoder, feature_decoder, heads (projector and predictor),
        target_encoder, target_projector, and training_step: 3 times the online parts (a backward
        pass costs two forward passes) plus the target parts.
    """
    counts = {
        "encoder": _encoder(config, config.num_keep, exact_cuts),
        "pixel_decoder": 0,
        "feature_decoder": 0,
        "heads": 0,
        "target_encoder": 0,
        "target_projector": 0,
    }
    if config.has_reconstruction:
        counts["pixel_decoder"] = _pixel_decoder(config, exact_cuts)
    if config.has_contrast:
        counts.update(_contrast(config, exact_cuts))
    online = sum(counts[name] for name in ("encoder", "pixel_decoder", "feature_decoder", "heads"))
    counts["training_step"] = 3 * online + counts["target_encoder"] + counts["target_projector"]
    return counts


def _blocks(dim: int, depth: int, num_tokens: int, mlp_ratio: float) -> int:
    """qkv, projection and MLP are (4 + 2 * mlp_ratio) D^2 a token; attention is 2 N^2 D."""
    hidden = int(dim * mlp_ratio)
    return depth * num_tokens * (4 * dim * dim + 2 * dim * hidden + 2 * num_tokens * dim)


def _encoder(config: ModelConfig, num_visible: int, exact_cuts: bool) -> int:
    if config.encoder == "hybrid":
        embedding = _conv_stages(config)
    else:
        num_embedded = num_visible if exact_cuts else config.num_patches
        embedding = num_embedded * config.patch_size**2 * 3 * config.embed_dim
    num_tokens = num_visible + config.num_prefix_tokens
    return embedding + _blocks(config.embed_dim, config.depth, num_tokens, config.mlp_ratio)


def _conv_stages(config: ModelConfig) -> int:
    """Embeddings, convolution blocks and fusion; they run on all positions, masked or not."""
    first, second = stage_dims(config)
    dim, count = config.embed_dim, 0
    inputs = ((16, FIRST_STRIDE**2 * 3, first), (4, 4 * first, second), (1, 4 * second, dim))
    for positions, width_in, width in inputs:
        count += positions * width_in * width
    for positions, width in ((16, first), (4, second)):
        hidden = int(width * config.mlp_ratio)
        block = 2 * width * width + 25 * width + 2 * width * hidden
        count += positions * (CONV_DEPTH * block + width * dim)
    return config.num_patches * (count + dim * dim)


def _pixel_decoder(config: ModelConfig, exact_cuts: bool) -> int:
    out_dim = config.patch_size**2 * 3
    full = _decoder(config, config.decoder_depth, out_dim, exact_cuts)
    if not exact_cuts:
        return full
    dim, num_tokens = config.decoder_embed_dim, config.num_patches + config.num_prefix_tokens
    # Per token left out of the last block: query, projection, MLP and its row of attention.
    per_token = 2 * dim * dim + 2 * dim * int(dim * config.decoder_mlp_ratio) + 2 * num_tokens * dim
    if config.feature_decoder == "shared" and config.has_contrast:
        per_token = 0
    skipped = num_tokens - config.num_mask
    return full - skipped * per_token + config.num_mask * dim * out_dim


def _decoder(config: ModelConfig, depth: int, out_dim: int, exact_cuts: bool) -> int:
    """Embedding and blocks; and the head, unless `exact_cuts` leaves it to the caller."""
    dim, num_tokens = config.decoder_embed_dim, config.num_patches + config.num_prefix_tokens
    num_embedded = config.num_keep + config.num_prefix_tokens if exact_cuts else num_tokens
    count = num_embedded * config.embed_dim * dim
    count += _blocks(dim, depth, num_tokens, config.decoder_mlp_ratio)
    return count if exact_cuts else count + num_tokens * dim * out_dim


def _contrast(config: ModelConfig, exact_cuts: bool) -> dict[str, int]:
    dim, hidden, out = config.embed_dim, config.proj_hidden_dim, config.proj_dim
    projector = dim * hidden + hidden * out
    predictor = out * hidden + hidden * out if config.predictor else 0
    head = config.decoder_embed_dim * dim
    feature = {
        "own": _decoder(config, config.feature_decoder_depth, dim, exact_cuts)
        + (head if exact_cuts else 0),
        "shared": head,
        "none": 0,
    }[config.feature_decoder]
    visible = config.num_keep if config.target_input == "visible" else config.num_patches
    target = _encoder(config, visible, exact_cuts)
    if exact_cuts and not config.target_final_norm:
        # Last MLP: no first layer for the prefix token, second layer once, after the mean.
        skipped = visible + 2 * config.num_prefix_tokens - 1
        target -= skipped * config.embed_dim * int(config.embed_dim * config.mlp_ratio)
    return {
        "feature_decoder": feature,
        "heads": projector + predictor,
        "target_encoder": target,
        "target_projector": projector,
    }
