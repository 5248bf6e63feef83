"""Trained models from the disk: run folders, checkpoints, exported encoders."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmae.errors import CmaeError
from cmae.model.cmae import CMAE, build_model
from cmae.model.config import ModelConfig
from cmae.model.export.checkpoints import encoder_fields
from cmae.model.export.convmae import from_convmae
from cmae.model.export.shards import SHARDS, read_whole, shards_of
from cmae.printable import printable

FORMAT = 1
"""Format number in every checkpoint of this project."""

_NAME = re.compile(r"step-\d{8}\.pt")
_RENAMED = {"mask_cell": "mask_unit"}
_DROPPED: dict[str, tuple[Any, ...]] = {"conv_depth": (2,), "feature_dim": (None,)}
"""Fields that a config no longer has, with the values that it now stands for."""


_OTHER = "take another checkpoint"


class CheckpointError(CmaeError):
    """A checkpoint that cannot be read, or does not fit the run."""


class ForeignFileError(CheckpointError):
    """A file that can be read, and is no checkpoint of this project."""


def load_model(path: str | Path) -> CMAE:
    """A trained model on the CPU, in evaluation mode; `model.features(images)` gives its features.

    A file with timm's names holds one encoder and no more: the model that comes from it has no decoders and
    no target, and its `encoder` is whichever branch was exported; one with ConvMAE's names may have the pixel
    decoder. A safetensors file of `cmae export` says how many heads it has; of other files those of the
    published models are taken.

    Args:
        path: Run folder (its newest checkpoint is taken), checkpoint, or file that `cmae export` wrote.

    Raises:
        CheckpointError: Nothing of the kind lies there, or it cannot be read.
    """
    path = _find_file(Path(path))
    state = read_file(path)
    if is_checkpoint(state):
        return _build_stored(path, state).eval()
    if "patch_embed.proj.weight" in state:
        return _load_encoder(path, state).eval()
    if "patch_embed1.proj.weight" in state:
        return from_convmae(state, **_noted_heads(path)).eval()
    raise _not_ours(path)


def _build_stored(path: Path, state: Mapping[str, Any]) -> CMAE:
    """The model of a checkpoint; nothing is allocated before its tensors fit its configuration."""
    sections, tensors = state.get("config"), state.get("model")
    stored = sections.get("model") if isinstance(sections, Mapping) else None
    if not isinstance(stored, Mapping) or not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path} is damaged: it lacks a configuration or weights; {_OTHER}")
    config = model_config(path, stored)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CMAE(config).state_dict().items()}
    lines = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    lines += [f"{name} is unknown" for name in tensors.keys() - shapes.keys()]
    for name in shapes.keys() & tensors.keys():
        found = getattr(tensors[name], "shape", None)
        if found != shapes[name]:
            size = "no tensor" if found is None else f"of shape {tuple(found)}"
            lines.append(f"{name} is {size}, its configuration makes {tuple(shapes[name])}")
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise CheckpointError(
            f"{path} is damaged: its weights are not those of its configuration: "
            f"{'; '.join(printable(line) for line in sorted(lines)[:3])}{more}; {_OTHER}"
        )
    model = build_model(config)
    model.load_state_dict(tensors)
    return model


def load_checkpoint(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """Read a checkpoint into host memory; only tensors and plain values are unpickled.

    Args:
        path: File of the checkpoint.
        whole: Whether to read weights and moments too where they lie in shards.

    Raises:
        CheckpointError: Missing, unreadable, or not a checkpoint of this project.
    """
    state = read_file(path, whole=whole)
    if not is_checkpoint(state):
        raise _not_ours(path)
    return state


def _with_shards(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the tensors that lie beside it.

    Raises:
        CheckpointError: They are missing or damaged.
    """
    folder = shards_of(path)
    try:
        found = read_whole(folder)
    except Exception as error:  # torch's reader raises anything on files that are something else
        raise CheckpointError(
            f"{path}: its shards in {folder} cannot be read ({_reason(error)}); `cmae checkpoint verify` "
            "says which. Where they were left behind, copy that folder too, beside the file"
        ) from error
    optimizer = {**state.get("optimizer", {}), **found["optimizer"]}
    return {**state, "model": found["model"], "optimizer": optimizer}


def is_checkpoint(state: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a checkpoint of this project and format."""
    return state.get("format") == FORMAT


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if has_step_name(path))


def has_step_name(path: Path) -> bool:
    """Whether a file is named as the checkpoint of a step: `step-00001000.pt`."""
    return _NAME.fullmatch(path.name) is not None


def model_config(path: Path, stored: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a checkpoint, where tuples are lists.

    Args:
        path: File it was read from, for the message.
        stored: Section `model` of the stored configuration.

    Raises:
        CheckpointError: A field is unknown to this version.
    """
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in current_fields(stored).items()
    }
    unknown = sorted(plain.keys() - {field.name for field in fields(ModelConfig)}, key=str)
    if unknown:
        raise CheckpointError(
            f"{path}: its model has {', '.join(f'{key}={plain[key]!r}' for key in unknown)}, which this "
            "version of cmae cannot build; read it with the version that wrote it"
        )
    default = ModelConfig()
    for key, value in plain.items():
        if not _is_like(value, getattr(default, key)):
            raise CheckpointError(
                f"{path} is damaged: in its configuration model.{key} is {printable(repr(value), limit=80)}, "
                f"and not like {getattr(default, key)!r}; {_OTHER}"
            )
    try:
        return ModelConfig(**plain)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_OTHER}") from error


def _is_like(value: Any, example: Any) -> bool:
    """Whether a stored value has the kind of a field's default."""
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, float):
        return isinstance(value, int | float) and math.isfinite(value)
    if isinstance(example, tuple):
        return isinstance(value, tuple) and all(_is_like(one, 0.5) for one in value)
    return isinstance(value, type(example))


def current_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored fields of a `ModelConfig` under their present names, without those that it no longer has."""
    return {
        _RENAMED.get(key, key): value
        for key, value in stored.items()
        if value not in _DROPPED.get(key, ())
    }


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is neither a file nor a folder; name a run folder, a checkpoint "
            "(`step-00001000.pt`), or a file that `cmae export` wrote"
        )
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        inside = sorted(entry.name for entry in path.iterdir())[:5]
        raise CheckpointError(
            f"{path} holds no checkpoint, neither beside {inside} nor in {path / 'checkpoints'}; name the "
            "folder that was `run.out` of a run, or a file"
        )
    return found[-1]


def read_file(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """The content of a file of weights, in host memory; only tensors and plain values are unpickled.

    Args:
        path: File to read.
        whole: Whether to read weights and moments too where they lie in shards beside it.

    Raises:
        CheckpointError: Unreadable, or no dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise anything on a file that is something else
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({_reason(error)}); if a run wrote it, delete it to "
            "go on from the checkpoint before it"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a checkpoint")
    is_in_shards = is_checkpoint(state) and SHARDS in state
    return _with_shards(path, state) if whole and is_in_shards else state


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to unpickle whatever a file holds."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds more than tensors and plain values, or its pickle is damaged"
    return f"{type(error).__name__}: {first[:200]}"


def _not_ours(path: Path) -> ForeignFileError:
    return ForeignFileError(
        f"{path} is not a cmae checkpoint of format {FORMAT}; weights of other projects go through "
        "`cmae import`"
    )


def _noted_heads(path: Path) -> dict[str, int]:
    """The numbers of heads in the notes of a safetensors file that `cmae export` wrote."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes = file.metadata() or {}
    heads = {name: notes.get(name, "") for name in ("num_heads", "decoder_num_heads")}
    return {name: int(value) for name, value in heads.items() if value.isdigit()}


def _load_encoder(path: Path, state: dict[str, Any]) -> CMAE:
    """A model of an exported encoder alone; a target's may lack the final norm."""
    try:
        sizes = encoder_fields(state, "", "blocks", "patch_embed.proj", "mlp.fc1")
        sizes |= _noted_heads(path)
        model = build_model(ModelConfig(**sizes, mask_unit=1, contrastive_loss="none"))
        model.pixel_decoder = None
        if "norm.weight" not in state:
            model.encoder.norm = nn.Identity()
        model.encoder.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no encoder that `cmae export` wrote ({error}); export the checkpoint again"
        ) from error
    return model
