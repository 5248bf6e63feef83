"""A model alone on the disk, and the weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from cmae.model import CMAE, ModelConfig
from cmae.model.export.checkpoints import check_finite, encoder_fields, unwrap
from cmae.model.export.stored import (
    FORMAT,
    CheckpointError,
    is_checkpoint,
    model_config,
    read_file,
)
from cmae.model.pos_embed import sincos_pos_embed
from cmae.train.checkpoints.writer import write_atomically

# Fields that shape the function of a part, so that equal shapes of its tensors are not enough.
_EVERYWHERE = ("pos_embed_order", "pixel_mean", "pixel_std")
_ENCODER = ("encoder", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
_PARTS: dict[str, tuple[str, ...]] = {
    "encoder": (*_EVERYWHERE, *_ENCODER),
    "target_encoder": (*_EVERYWHERE, *_ENCODER, "target_final_norm"),
    "pixel_decoder": (
        *("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decoder_mlp_ratio"),
        "norm_pix_loss",
    ),
    "feature_decoder": (
        *("decoder_embed_dim", "decoder_num_heads", "decoder_mlp_ratio", "feature_decoder"),
        "feature_decoder_depth",
    ),
    "projector": ("proj_hidden_dim", "proj_dim", "head_norm", "feature_decoder"),
    "target_projector": ("proj_hidden_dim", "proj_dim", "head_norm"),
    "predictor": ("proj_hidden_dim", "proj_dim", "head_norm"),
}
_GUESSED = ("num_heads", "pixel_mean", "pixel_std")
"""Fields that a file of bare weights does not show: the model's are taken."""


def save_model(model: CMAE, out: Path) -> None:
    """Write a model alone: a checkpoint that `init_from`, `reconstruct` and `export` read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fields = asdict(model.config).items()
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in fields}
    state = {"config": {"model": config}, "model": model.state_dict()}
    write_atomically(out, {"format": FORMAT, "step": 0, **state})


def load_initial_weights(model: CMAE, path: Path) -> str:
    """Start a model from a file's weights; parts that the file lacks stay as initialised.

    The file is a checkpoint of this project, or an encoder alone under timm's names (`cmae export`, timm,
    facebookresearch/mae). Losses, masks and momentum may differ from the checkpoint's; what shapes the
    function of a part may not. Position embeddings are a fixed table, which is computed for the model's own
    image size. Without a target in the file, the target starts as a copy of the loaded online branch.

    Returns:
        What was loaded and what was not, for the log.

    Raises:
        CheckpointError: A part has another function or shape, a tensor is missing or not finite, or the
            position embeddings were learned.
    """
    state = read_file(path)
    if is_checkpoint(state):
        stored, config = dict(state["model"]), model_config(path, state["config"]["model"])
        notes = []
    else:
        stored, config = _read_encoder(path, state, model.config)
        notes = [
            f"number of heads is not in the file: {model.config.num_heads} as in model.num_heads"
        ]
    check_finite(stored, f"init_from={path}", error=CheckpointError)
    own = model.state_dict()
    _check_parts(path, stored, config, model.config)
    _check_tables(path, stored, config, model.config)
    stored = {name: value for name, value in stored.items() if not name.endswith("pos_embed")}
    _check_tensors(path, stored, own)
    model.load_state_dict({name: stored[name] for name in own.keys() & stored.keys()}, strict=False)
    if model.config.has_contrast and not any(name.startswith("target_") for name in stored):
        model.reset_target()
        notes.append("the target starts as a copy of the online branch")
    return _describe(path, stored, own, notes)


def _read_encoder(
    path: Path, state: Mapping[str, object], current: ModelConfig
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The encoder of a file with timm's names, and its sizes; what else is in the file is left out."""
    source = unwrap(state)
    names = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    encoder = {name: value for name, value in source.items() if name.startswith(names)}
    if "patch_embed.proj.weight" not in encoder:
        raise CheckpointError(
            f"init_from={path}: neither a checkpoint of this project nor an encoder with timm's names "
            "(patch_embed.proj.weight is not in it); weights of other projects go through `cmae import`"
        )
    try:
        sizes = encoder_fields(encoder, "", "blocks", "patch_embed.proj", "mlp.fc1")
    except ValueError as error:
        raise CheckpointError(f"init_from={path}: {error}") from error
    known = asdict(current) | sizes | {name: getattr(current, name) for name in _GUESSED}
    known |= {"encoder": "vit", "pos_embed_order": _order_of(encoder, current)}
    # Any will do: the encoder does not see them.
    known |= {"mask_unit": 1, "contrastive_loss": "none"}
    left_out = {name: value for name, value in source.items() if name not in encoder}
    return (
        {f"encoder.{name}": value for name, value in encoder.items()} | left_out,
        ModelConfig(**known),
    )


def _order_of(encoder: Mapping[str, Tensor], current: ModelConfig) -> str:
    """Order of the table in a file; the model's own where it is neither of the two."""
    table = encoder["pos_embed"]
    side = round((table.shape[1] - 1) ** 0.5)
    for order in ("row", "column"):
        made = sincos_pos_embed(table.shape[2], (side, side), order=order)
        if made.shape == table.shape and torch.allclose(made, table.float(), atol=1e-4):
            return order
    return current.pos_embed_order


def _check_parts(
    path: Path, stored: Mapping[str, Tensor], config: ModelConfig, current: ModelConfig
) -> None:
    lines: list[str] = []
    for part, names in _PARTS.items():
        if not any(name.startswith(f"{part}.") for name in stored):
            continue
        for name in names:
            then, now = getattr(config, name), getattr(current, name)
            is_gone = (
                part in ("feature_decoder", "projector") and current.contrastive_loss == "none"
            )
            if then != now and not is_gone:
                value = list(then) if isinstance(then, tuple) else then
                lines.append(
                    f"{part}: model.{name} is {then} there, {now} here (--model.{name} {value!r})"
                )
    if lines:
        raise CheckpointError(
            f"init_from={path} computes something else than this model would with its weights:\n  "
            + "\n  ".join(dict.fromkeys(lines))
        )


def _check_tables(
    path: Path, stored: Mapping[str, Tensor], config: ModelConfig, current: ModelConfig
) -> None:
    """Refuse position embeddings that are not the fixed table of the file's own size."""
    for name, table in stored.items():
        if not name.endswith("pos_embed"):
            continue
        made = sincos_pos_embed(
            table.shape[-1],
            config.grid,
            order=config.pos_embed_order,
            num_prefix_tokens=config.num_prefix_tokens,
        )
        if made.shape != table.shape or not torch.allclose(made, table.float().cpu(), atol=1e-4):
            raise CheckpointError(
                f"init_from={path}: {name} is not the fixed sine-cosine table (it was learned, or changed), "
                "and the model has no other; take weights of a model with fixed position embeddings, such as "
                "MAE's or CMAE's"
            )


def _check_tensors(path: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    lines = [
        f"{name} has shape {tuple(stored[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own.keys() & stored.keys()
        if own[name].shape != stored[name].shape
    ]
    lines += [
        f"{name} is missing"
        for name in own
        if name.startswith("encoder.") and not name.endswith("pos_embed") and name not in stored
    ]
    if lines:
        raise CheckpointError(
            f"init_from={path}: {len(lines)} tensors do not fit the model:\n  "
            + "\n  ".join(sorted(lines)[:8])
            + "\nset the sizes in [model] as in the file"
        )


def _describe(
    path: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor], notes: list[str]
) -> str:
    is_table = {name for name in own if name.endswith("pos_embed")}
    parts = {name.split(".")[0] for name in own.keys() - stored.keys() - is_table}
    fresh = sorted(part for part in parts if not part.startswith("target_"))
    unused = sorted(stored.keys() - own.keys())
    lines = [f"weights from {path}", *notes]
    lines += [f"freshly initialised: {', '.join(fresh)}"] if fresh else []
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        lines.append(f"not used: {shown}")
    return "; ".join(lines)
