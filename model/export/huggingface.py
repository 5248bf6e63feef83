"""Encoders and MAE models under the names of Hugging Face's transformers (ViTModel, ViTMAEForPreTraining).

Only names and layouts change: the exported model computes what ours computes. The names are those of
transformers 4; version 5 reads them too.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from cmae.errors import CmaeError
from cmae.model.cmae import CMAE
from cmae.model.config import STANDARD_MEAN, STANDARD_STD
from cmae.model.export.checkpoints import check_finite, to_timm

StateDict = dict[str, Tensor]

_EPS = 1e-6


def to_vit(
    model: CMAE, *, branch: Literal["online", "target"] = "online"
) -> tuple[StateDict, dict[str, Any]]:
    """An encoder as weights and `config.json` of `ViTModel` (add_pooling_layer=False).

    Args:
        model: Model with a plain ViT encoder.
        branch: Encoder to export; it must have a final norm.

    Raises:
        CmaeError: The encoder is not a plain ViT, there is no such branch, or it has no final norm.
    """
    state = to_timm(model, branch=branch)
    if "norm.weight" not in state:
        raise CmaeError(
            "this target encoder has no final norm, and ViTModel always has one: export the online encoder, "
            "or train with model.target_final_norm"
        )
    weights = _encoder(state, "")
    return weights, {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "encoder_stride": model.config.patch_size,
        **_sizes(model),
    }


def to_vit_mae(model: CMAE) -> tuple[StateDict, dict[str, Any]]:
    """The online encoder and the pixel decoder as weights and `config.json` of `ViTMAEForPreTraining`.

    It draws its own masks, patch by patch; the mask units of CMAE are not among its settings.

    Raises:
        CmaeError: There is no pixel decoder, or the encoder is not a plain ViT.
    """
    decoder, config = model.pixel_decoder, model.config
    if decoder is None:
        raise CmaeError(
            "this model has no pixel decoder: export the encoder alone (format huggingface)"
        )
    own = {name: value.detach().clone() for name, value in decoder.state_dict().items()}
    check_finite(own, "the pixel decoder")
    weights = _encoder(to_timm(model), "vit.")
    weights |= {
        "decoder.mask_token": own["mask_token"],
        "decoder.decoder_pos_embed": own["pos_embed"],
    }
    for part in ("weight", "bias"):
        weights[f"decoder.decoder_embed.{part}"] = own[f"embed.{part}"]
        weights[f"decoder.decoder_norm.{part}"] = own[f"norm.{part}"]
        weights[f"decoder.decoder_pred.{part}"] = own[f"head.{part}"]
    for block in range(config.decoder_depth):
        weights |= _block(own, f"blocks.{block}.", f"decoder.decoder_layers.{block}.")
    return weights, {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_sizes(model),
        "decoder_hidden_size": config.decoder_embed_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": int(config.decoder_embed_dim * config.decoder_mlp_ratio),
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix_loss,
    }


def preprocessor(model: CMAE) -> dict[str, Any]:
    """`preprocessor_config.json` of a ViTImageProcessor."""
    side = model.config.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in STANDARD_MEAN],
        "image_std": [value / 255 for value in STANDARD_STD],
    }


def _sizes(model: CMAE) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": _EPS,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


def _encoder(state: StateDict, prefix: str) -> StateDict:
    weights = {
        f"{prefix}embeddings.cls_token": state["cls_token"],
        f"{prefix}embeddings.position_embeddings": state["pos_embed"],
    }
    for part in ("weight", "bias"):
        patch = state[f"patch_embed.proj.{part}"]
        weights[f"{prefix}embeddings.patch_embeddings.projection.{part}"] = patch
        weights[f"{prefix}layernorm.{part}"] = state[f"norm.{part}"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for block in range(depth):
        weights |= _block(state, f"blocks.{block}.", f"{prefix}encoder.layer.{block}.")
    return weights


def _block(state: StateDict, ours: str, theirs: str) -> StateDict:
    names = {
        "attn.proj": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    weights: StateDict = {}
    for part in ("weight", "bias"):
        for name, other in names.items():
            weights[f"{theirs}{other}.{part}"] = state[f"{ours}{name}.{part}"]
        rows = state[f"{ours}attn.qkv.{part}"].chunk(3)
        for name, value in zip(("query", "key", "value"), rows, strict=True):
            weights[f"{theirs}attention.attention.{name}.{part}"] = value.contiguous()
    return weights
