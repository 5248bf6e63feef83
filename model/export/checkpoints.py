"""Weights of other projects, in and out.

Only names and layouts are translated; an imported model computes what the original computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cmae.errors import CmaeError
from cmae.model.cmae import CMAE
from cmae.model.config import STANDARD_MEAN, STANDARD_STD, ModelConfig
from cmae.model.hybrid import Encoder
from cmae.model.pixels import renormalisation

StateDict = dict[str, Tensor]
Renames = tuple[tuple[str, str], ...]

_MOST_WRAPPERS = 4
"""Prefixes around names that are taken away, one after another."""

DECODER_NAMES: Renames = (
    (r"^((?:pixel|feature)_decoder\.)(embed|pos_embed|blocks)\b", r"\1decoder_\2"),
    (r"^((?:pixel|feature)_decoder\.)head\b", r"\1decoder_pred"),
)

# Our key -> the key in a checkpoint of ZhichengHuang/CMAE (mmcv's layer names), in this order.
_AUTHORS_NAMES: Renames = (
    (r"^(projector|target_projector|predictor)\.fc1\b", r"\1.fc0"),
    (r"^(projector|target_projector|predictor)\.norm\b", r"\1.bn0"),
    (r"^(projector|target_projector|predictor)\.fc2\b", r"\1.fc1"),
    (r"^predictor\.", "head.predictor."),
    (r"^encoder\.", "backbone."),
    (r"^target_encoder\.", "target_backbone."),
    (r"(backbone\.)blocks\b", r"\1layers"),
    (r"\bpatch_embed\.proj\b", "patch_embed.projection"),
    *DECODER_NAMES,
    (r"\bnorm([12])\b", r"ln\1"),
    (r"\.norm\.", ".ln1."),
    (r"\bmlp\.fc1\b", "ffn.layers.0.0"),
    (r"\bmlp\.fc2\b", "ffn.layers.1"),
)

# Our key -> the key in a checkpoint of facebookresearch/mae.
_MAE_NAMES: Renames = (
    (r"^encoder\.", ""),
    *DECODER_NAMES,
    (r"^pixel_decoder\.norm\b", "decoder_norm"),
    (r"^pixel_decoder\.", ""),
)


def from_authors(
    state_dict: Mapping[str, Any], *, channel_order: Literal["rgb", "bgr"], **overrides: Any
) -> CMAE:
    """A CMAE with the weights of a pretraining checkpoint of the authors' code.

    Sizes are read from the weights. Numbers of heads are not in them: those of the published
    models are taken (encoder embed_dim / 64, H 16, the authors' 's' 8; decoders 16).

    Args:
        state_dict: Checkpoint, or its 'state_dict' or 'model' entry; keys may start with
            'module.'.
        channel_order: Order in which the original network saw the channels. The authors' loader
            gives BGR images normalised with the mean and standard deviation of RGB. With 'bgr'
            the imported model takes RGB images like any other and gives the features and losses
            that the original gives for the same image in BGR: channels are permuted in the
            weights, and pixel_mean and pixel_std are reversed.
        **overrides: Fields of `ModelConfig`, such as num_heads or mask_ratio.

    Raises:
        CmaeError: A key is missing or unknown, or a shape does not fit; the message names it.
    """
    if channel_order not in ("rgb", "bgr"):
        raise CmaeError(f"channel_order={channel_order!r}: choose 'rgb' or 'bgr'.")
    source = unwrap(state_dict)
    fields = encoder_fields(
        source, "backbone.", "layers", "patch_embed.projection", "ffn.layers.0.0"
    )
    fields |= decoder_fields(source, "pixel_decoder.", "ffn.layers.0.0")
    fields["feature_decoder_depth"] = count_blocks(source, "feature_decoder.decoder_blocks")
    fields["proj_hidden_dim"] = shape_of(source, "projector.fc0.weight")[0]
    fields["proj_dim"] = shape_of(source, "projector.fc1.weight")[0]
    fields["target_final_norm"] = "target_backbone.ln1.weight" in source
    if channel_order == "bgr":
        fields |= {"pixel_mean": STANDARD_MEAN[::-1], "pixel_std": STANDARD_STD[::-1]}
    model = CMAE(ModelConfig(**fields | overrides))
    return load_renamed(model, source, _AUTHORS_NAMES, reverse_channels=channel_order == "bgr")


def from_mae(state_dict: Mapping[str, Any], **overrides: Any) -> CMAE:
    """An MAE (contrastive_loss='none') with the weights of a checkpoint of facebookresearch/mae.

    The checkpoint must hold the decoder too, as pretraining and the visualisation models save it.

    Args:
        state_dict: Checkpoint, or its 'model' entry.
        **overrides: Fields of `ModelConfig`, such as num_heads or norm_pix_loss=False.

    Raises:
        CmaeError: A key is missing or unknown, or a shape does not fit; the message names it.
    """
    source = unwrap(state_dict)
    fields = encoder_fields(source, "", "blocks", "patch_embed.proj", "mlp.fc1")
    fields |= decoder_fields(source, "", "mlp.fc1")
    fields |= {
        "contrastive_loss": "none",
        "mask_ratio": 0.75,
        "mask_unit": 1,
        "pos_embed_order": "column",
    }
    return load_renamed(CMAE(ModelConfig(**fields | overrides)), source, _MAE_NAMES)


def to_timm(model: CMAE, *, branch: Literal["online", "target"] = "online") -> StateDict:
    """An encoder as a state dict for timm's VisionTransformer with num_classes=0.

    For images normalised with the standard mean and standard deviation; a model with other
    constants has the difference folded into its patch embedding.

    Args:
        model: Model with a plain ViT encoder.
        branch: Encoder to export: 'online', or 'target' for its moving average, which has a final norm only
            with target_final_norm (without one, build timm's model with final_norm=False).

    Raises:
        CmaeError: The encoder is not a plain ViT, or there is no such branch.
    """
    if model.config.encoder != "vit":
        raise CmaeError(
            f"encoder={model.config.encoder!r} has no timm counterpart; export it with "
            "ConvMAE's names (to_convmae, `cmae export --to convmae`)."
        )
    state = {
        key: value.detach().clone() for key, value in encoder_of(model, branch).state_dict().items()
    }
    check_finite(state, "the model")
    fold_normalisation(state, "patch_embed.proj", model.config)
    return state


def encoder_of(model: CMAE, branch: str) -> Encoder:
    """The encoder of a branch: 'online', or 'target' for its moving average.

    Raises:
        CmaeError: There is no such branch.
    """
    encoder: Encoder | None = {"online": model.encoder, "target": model.target_encoder}.get(branch)
    if encoder is None:
        raise CmaeError(f"branch={branch!r}: this model has no such branch; choose 'online'.")
    return encoder


def fold_normalisation(state: StateDict, patch: str, config: ModelConfig) -> None:
    """Make a patch embedding take images of the standard mean and deviation, in place.

    Args:
        state: Tensors by name.
        patch: Name of the embedding, without '.weight'.
        config: Configuration with the constants that it was trained with.
    """
    scale, shift = renormalisation(config)
    weight = state[f"{patch}.weight"]  # (D, 3, P, P)
    state[f"{patch}.bias"] += weight.sum(dim=(2, 3)) @ weight.new_tensor(shift)
    state[f"{patch}.weight"] = weight * weight.new_tensor(scale)[:, None, None]


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint under the names of its network.

    Taken away, in whatever order they were put around it: the entries 'state_dict' and 'model', the prefix
    'module.' of DDP, '_orig_mod.' of torch.compile anywhere in a name, and 'model.' of Lightning where every
    tensor has it. What is no tensor is left out.
    """
    while True:
        wrapper = next(
            (one for one in ("state_dict", "model") if isinstance(state_dict.get(one), Mapping)),
            None,
        )
        if wrapper is None:
            break
        state_dict = state_dict[wrapper]
    found = {
        key.replace("_orig_mod.", ""): value
        for key, value in state_dict.items()
        if isinstance(value, Tensor)
    }
    for _ in range(_MOST_WRAPPERS):
        for prefix in ("module.", "model."):
            if found and all(key.startswith(prefix) for key in found):
                found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def check_finite(
    state: Mapping[str, Tensor], what: str, *, error: type[CmaeError] = CmaeError
) -> None:
    """Refuse weights with NaN or infinity.

    Args:
        state: Tensors by name.
        what: Origin of the weights, for the message.
        error: Class of the error.

    Raises:
        CmaeError: A tensor is not finite; the first ones are named.
    """
    bad = [
        f"{name} ({int((~torch.isfinite(value)).sum())} of {value.numel()} values)"
        for name, value in state.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if bad:
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise error(
            f"{what}: weights are NaN or infinite: {', '.join(bad[:3])}{more}; take an earlier checkpoint, "
            "from before the loss diverged"
        )


def load_renamed(
    model: CMAE, source: dict[str, Any], renames: Renames, *, reverse_channels: bool = False
) -> CMAE:
    """The model with the weights that `source` has under other names.

    Args:
        model: Model of the sizes that the weights show.
        source: State dict of another project.
        renames: Pairs of a pattern and its replacement that make their names of ours.
        reverse_channels: Whether to permute BGR to RGB in what touches pixels.

    Raises:
        CmaeError: A key is missing or unknown, or a shape does not fit; the message names it.
    """
    own = model.state_dict()
    names = {renamed(key, renames): key for key in own}
    missing, unknown = sorted(names.keys() - source.keys()), sorted(source.keys() - names.keys())
    if missing or unknown:
        raise CmaeError(
            f"the checkpoint does not fit: missing keys {missing}, unknown keys {unknown}. It "
            "must be a whole pretraining checkpoint of the architecture that its weights show."
        )
    for name, key in names.items():
        if source[name].shape != own[key].shape:
            raise CmaeError(
                f"{name} has shape {tuple(source[name].shape)}, expected {tuple(own[key].shape)}; "
                "pass the config field that decides it."
            )
    state = {key: source[name] for name, key in names.items()}
    check_finite(state, "the checkpoint")
    if reverse_channels:
        _reverse_channels(state, model.config.patch_size)
    if state["encoder.pos_embed"].dtype == torch.float64:
        model.double()
    model.load_state_dict(state)
    return model


def _reverse_channels(state: StateDict, patch_size: int) -> None:
    """RGB for BGR in the patch embeddings' inputs and the pixel head's outputs."""
    for encoder in ("encoder", "target_encoder"):
        key = f"{encoder}.patch_embed.proj.weight"
        state[key] = state[key].flip(1)
    for key in ("pixel_decoder.head.weight", "pixel_decoder.head.bias"):
        state[key] = state[key].unflatten(0, (patch_size**2, 3)).flip(1).flatten(0, 1)


def renamed(key: str, renames: Renames) -> str:
    """A name of ours under another project's rules, applied in their order."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def shape_of(source: dict[str, Any], key: str) -> torch.Size:
    """Shape of a tensor; a missing one is an error that names it."""
    if key not in source:
        raise CmaeError(f"the checkpoint has no key {key!r}, from which a size is read.")
    shape: torch.Size = source[key].shape
    return shape


def count_blocks(source: dict[str, Any], prefix: str) -> int:
    """How many numbered blocks there are under a prefix; none is an error that names it."""
    numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in source]
    depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    if not depth:
        raise CmaeError(f"the checkpoint has no keys {prefix}.<number>.*")
    return depth


def encoder_fields(
    source: dict[str, Any], prefix: str, blocks: str, patch: str, fc1: str
) -> dict[str, Any]:
    """Fields of `ModelConfig` that the shapes of an encoder's weights show.

    Args:
        source: State dict.
        prefix: Beginning of the encoder's keys.
        blocks: Name of the list of blocks.
        patch: Name of the patch embedding.
        fc1: Name of the MLP's first layer in a block.

    Raises:
        CmaeError: A key is missing; the message names it.
    """
    embed_dim, _, _, patch_size = shape_of(source, f"{prefix}{patch}.weight")
    num_patches = shape_of(source, f"{prefix}pos_embed")[1] - 1
    depth = count_blocks(source, prefix + blocks)
    hidden = shape_of(source, f"{prefix}{blocks}.0.{fc1}.weight")[0]
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": published_heads(embed_dim, depth),
        "mlp_ratio": hidden / embed_dim,
        "patch_size": patch_size,
        "img_size": math.isqrt(num_patches) * patch_size,
    }


def published_heads(embed_dim: int, depth: int) -> int:
    """Heads of 64 channels, but for H (80) and the authors' own small model (96)."""
    special = {(1280, 32): 16, (768, 8): 8}
    return special.get((embed_dim, depth), max(1, embed_dim // 64))


def decoder_fields(source: dict[str, Any], prefix: str, fc1: str) -> dict[str, Any]:
    """Fields of `ModelConfig` that the shapes of a decoder's weights show; like `encoder_fields`."""
    dim = shape_of(source, f"{prefix}decoder_embed.weight")[0]
    hidden = shape_of(source, f"{prefix}decoder_blocks.0.{fc1}.weight")[0]
    return {
        "decoder_embed_dim": dim,
        "decoder_mlp_ratio": hidden / dim,
        "decoder_depth": count_blocks(source, f"{prefix}decoder_blocks"),
    }
