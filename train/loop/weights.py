"""A model alone on the disk, and the weights that a run starts from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from cmae.model import CMAE, ModelConfig
from cmae.model.export.stored import FORMAT, CheckpointError, load_checkpoint, model_config
from cmae.train.loop.checkpoint import write_atomically


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
        CheckpointError: A tensor has another shape, the encoder is incomplete, or its pixels were
            normalised otherwise.
    """
    state = load_checkpoint(path)
    stored: dict[str, torch.Tensor] = state["model"]
    own = model.state_dict()
    _check_pixels(path, model_config(path, state["config"]["model"]), model.config)
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
