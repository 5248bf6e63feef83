"""Hybrid encoders from and to the names of Alpha-VL/ConvMAE."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from cmae.errors import CmaeError
from cmae.model.cmae import CMAE
from cmae.model.config import ModelConfig
from cmae.model.export.checkpoints import (
    DECODER_NAMES,
    Renames,
    StateDict,
    check_finite,
    count_blocks,
    decoder_fields,
    encoder_of,
    fold_normalisation,
    load_renamed,
    published_heads,
    renamed,
    shape_of,
    unwrap,
)
from cmae.model.hybrid import HybridEncoder

_STAGE = r"^(blocks[12]\.\d+)"

# Our key -> the key in a checkpoint of Alpha-VL/ConvMAE.
_NAMES: Renames = (
    (r"^encoder\.blocks\b", "blocks3"),
    (r"^encoder\.stages\.0\b", "blocks1"),
    (r"^encoder\.stages\.1\b", "blocks2"),
    (rf"{_STAGE}\.fc([12])\b", r"\1.conv\2"),
    (rf"{_STAGE}\.depthwise\b", r"\1.attn"),
    (r"^encoder\.patch_embed\b", "patch_embed1"),
    (r"^encoder\.embed_norm\.0\b", "patch_embed1.norm"),
    (r"^encoder\.embed_norm\.1\b", "patch_embed2.norm"),
    (r"^encoder\.embed_norm\.2\b", "patch_embed3.norm"),
    (r"^encoder\.merge\.0\b", "patch_embed2.proj"),
    (r"^encoder\.merge\.1\b", "patch_embed3.proj"),
    (r"^encoder\.embed\b", "patch_embed4"),
    (r"^encoder\.fuse\.0\b", "stage1_output_decode"),
    (r"^encoder\.fuse\.1\b", "stage2_output_decode"),
    (r"^encoder\.", ""),
    *DECODER_NAMES,
    (r"^pixel_decoder\.norm\b", "decoder_norm"),
    (r"^pixel_decoder\.", ""),
)

_POINTWISE = re.compile(rf"{_STAGE}\.(conv[12]|mlp\.fc[12])\.weight")
"""Weights that are convolutions of one pixel there and linear layers here."""


def from_convmae(state_dict: Mapping[str, Any], **overrides: Any) -> CMAE:
    """A hybrid model (contrastive_loss='none') with the weights of a checkpoint of Alpha-VL/ConvMAE.

    A file without a decoder gives a model without one, for features and fine-tuning; one without the
    projections of the stages' features (`stage1_output_decode`), as it is after fine-tuning, a model that
    adds none.

    Args:
        state_dict: Checkpoint, or its 'model' entry.
        **overrides: Fields of `ModelConfig`, such as num_heads or norm_pix_loss=False.

    Raises:
        CmaeError: A key is missing or unknown, or a shape does not fit; the message names it.
    """
    source = unwrap(state_dict)
    _, num_patches, embed_dim = shape_of(source, "pos_embed")
    depth = count_blocks(source, "blocks3")
    fields: dict[str, Any] = {
        "encoder": "hybrid",
        "patch_size": 16,
        "img_size": 16 * math.isqrt(num_patches),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": published_heads(embed_dim, depth),
        "mlp_ratio": shape_of(source, "blocks3.0.mlp.fc1.weight")[0] / embed_dim,
        "contrastive_loss": "none",
        "mask_ratio": 0.75,
        "mask_unit": 1,
        "pos_embed_order": "column",
    }
    has_decoder = any(key.startswith("decoder_") for key in source)
    if has_decoder:
        fields |= decoder_fields(source, "", "mlp.fc1")
    model = CMAE(ModelConfig(**fields | overrides))
    assert isinstance(model.encoder, HybridEncoder)
    if not has_decoder:
        model.pixel_decoder = None
    if "stage1_output_decode.weight" not in source:
        model.encoder.drop_features()
    flat = {
        key: value[:, :, 0, 0] if _POINTWISE.fullmatch(key) and value.ndim == 4 else value
        for key, value in source.items()
    }
    return load_renamed(model, flat, _NAMES)


def to_convmae(model: CMAE, *, branch: Literal["online", "target"] = "online") -> StateDict:
    """A hybrid encoder as a state dict with ConvMAE's names; its fine-tuning code reads it.

    For images normalised with the standard mean and standard deviation. The online branch has its pixel
    decoder with it, so that `from_convmae` gives the model back.

    Args:
        model: Model with a hybrid encoder.
        branch: Encoder to export: 'online', or 'target' for its moving average, which has a final norm only
            with target_final_norm.

    Raises:
        CmaeError: The encoder is a plain ViT, or there is no such branch.
    """
    if model.config.encoder != "hybrid":
        raise CmaeError(
            f"encoder={model.config.encoder!r} has no counterpart in ConvMAE; only 'hybrid': use to_timm."
        )
    parts: dict[str, nn.Module] = {"encoder": encoder_of(model, branch)}
    if branch == "online" and model.pixel_decoder is not None:
        parts["pixel_decoder"] = model.pixel_decoder
    state = {}
    for part, module in parts.items():
        for key, value in module.state_dict().items():
            name, copy = renamed(f"{part}.{key}", _NAMES), value.detach().clone()
            state[name] = copy[:, :, None, None] if _POINTWISE.fullmatch(name) else copy
    check_finite(state, "the model")
    fold_normalisation(state, "patch_embed1.proj", model.config)
    return state
