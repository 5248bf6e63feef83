"""`cmae import` and `cmae export`: weights from other projects, and for timm."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from cmae.model import CMAE, ModelConfig, build_model, from_authors, from_mae, to_timm
from cmae.train.checkpoint import (
    FORMAT,
    CheckpointError,
    load_checkpoint,
    write_atomically,
)


def load_model(checkpoint: Path) -> CMAE:
    """The model in a checkpoint, with the configuration it was trained with, on the CPU.

    Raises:
        CheckpointError: missing, unreadable, or not a checkpoint of this project.
    """
    state = load_checkpoint(checkpoint)
    model = build_model(model_config(state["config"]["model"]))
    model.load_state_dict(state["model"])
    return model.eval()


def save_model(model: CMAE, out: Path) -> None:
    """Write a model alone: a checkpoint that `init_from`, `reconstruct` and `export` read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fields = asdict(model.config).items()
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in fields}
    state = {"config": {"model": config}, "model": model.state_dict()}
    write_atomically(out, {"format": FORMAT, "step": 0, **state})


def load_initial_weights(model: CMAE, path: Path) -> str:
    """Start a model from a checkpoint's weights; parts that the checkpoint lacks stay as initialised.

    Losses, masks and momentum may differ from the checkpoint's, the encoder may not. Without a target in the
    checkpoint (MAE), the target starts as a copy of the loaded online branch.

    Returns:
        What was loaded and what was not, for the log.

    Raises:
        CheckpointError: a tensor has another shape, the encoder is incomplete, or its pixels were
            normalised otherwise.
    """
    state = load_checkpoint(path)
    stored: dict[str, torch.Tensor] = state["model"]
    own = model.state_dict()
    _check_pixels(path, model_config(state["config"]["model"]), model.config)
    wrong = [name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape]
    wrong += [name for name in own if name.startswith("encoder.") and name not in stored]
    if wrong:
        raise CheckpointError(
            f"init_from={path}: {len(wrong)} tensors do not fit the model, the first: {min(wrong)}; set the "
            "sizes in [model] as in the checkpoint"
        )
    model.load_state_dict({name: stored[name] for name in own.keys() & stored.keys()}, strict=False)
    if not any(name.startswith("target_") for name in stored):
        model.reset_target()
    fresh = sorted({name.split(".")[0] for name in own.keys() - stored.keys()})
    return f"weights from {path}" + (f"; freshly initialised: {', '.join(fresh)}" if fresh else "")


def _check_pixels(path: Path, stored: ModelConfig, current: ModelConfig) -> None:
    for key in ("pixel_mean", "pixel_std"):
        if getattr(stored, key) != getattr(current, key):
            raise CheckpointError(
                f"init_from={path}: its network saw pixels normalised with {key} {getattr(stored, key)}, "
                f"the model has {getattr(current, key)}; add --model.{key} "
                f"'{list(getattr(stored, key))}'"
            )


def model_config(stored: dict[str, Any]) -> ModelConfig:
    """A configuration from its form in a checkpoint, where tuples are lists."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    return ModelConfig(**fields)


def import_weights(
    source: Path,
    out: Path,
    layout: Literal["authors", "mae"] = "authors",
    channel_order: Literal["rgb", "bgr"] = "bgr",
    trust: bool = False,
) -> int:
    """Turn a checkpoint of the CMAE authors' code or of MAE into one of this project.

    The result works with `cmae reconstruct`, `cmae export` and `cmae pretrain --init_from`.

    Args:
        source: a file that torch.save wrote: a state dict, or a dict that holds one.
        out: checkpoint to write.
        layout: names in the file: 'authors' for ZhichengHuang/CMAE, 'mae' for facebookresearch/mae.
        channel_order: order of the colour channels that the network was trained on ('authors' only);
            the authors' own weights are 'bgr'.
        trust: also unpickle objects that are not tensors (logs and settings that training frameworks
            store beside the weights); such a file can run any code, so know where it comes from.
    """
    loaded = _read_foreign(source, trust=trust)
    try:
        model = (
            from_mae(loaded)
            if layout == "mae"
            else from_authors(loaded, channel_order=channel_order)
        )
    except ValueError as error:
        raise ValueError(f"{source}, read with layout={layout!r}: {error}") from error
    save_model(model, out)
    _say(f"{out}: {_describe(model)} from {source}")
    return 0


def export_weights(
    checkpoint: Path, out: Path, branch: Literal["online", "target"] = "online"
) -> int:
    """Write the encoder of a checkpoint with timm's names.

    Read it with timm.create_model('vit_base_patch16_224', num_classes=0, checkpoint_path=OUT) or, for the
    file as a dict, torch.load or safetensors.torch.load_file.

    Args:
        checkpoint: of this project.
        out: file to write; with the suffix .safetensors it is one, else torch.save writes it.
        branch: 'online' is the trained encoder, 'target' its moving average.
    """
    model = load_model(checkpoint)
    state = to_timm(model, branch=branch)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in state.items()}, out)
    else:
        write_atomically(out, state)
    _say(f"{out}: {branch} encoder, {_describe(model)}, {len(state)} tensors with timm's names")
    return 0


def _read_foreign(source: Path, *, trust: bool) -> dict[str, Any]:
    if not source.is_file():
        raise ValueError(f"{source} is not a file; name what torch.save wrote")
    try:
        loaded: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=not trust)
    except Exception as error:  # torch's reader raises anything on a file that is something else
        hint = "" if trust else "; if it holds more than tensors and you trust it, add --trust true"
        raise ValueError(
            f"{source} cannot be read ({type(error).__name__}: {error}){hint}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{source} holds a {type(loaded).__name__}; expected a state dict")
    return loaded


def _describe(model: CMAE) -> str:
    config = model.config
    return (
        f"{config.encoder} {config.embed_dim}/{config.depth}/{config.num_heads}, patch "
        f"{config.patch_size}, image {config.img_size}"
    )


def _say(message: str) -> None:
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)
