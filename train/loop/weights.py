"""`cmae import` and `cmae export`: weights from other projects, and for timm."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmae.model import CMAE, ModelConfig, build_model
from cmae.train.loop.checkpoint import FORMAT, CheckpointError, load_checkpoint, write_atomically


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
