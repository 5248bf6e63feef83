"""Settings that older recipes, commands and checkpoints have and this version has not, or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Moved:
    """A setting that has another name now."""

    to: str
    """Its dotted key."""
    values: Mapping[Any, Any] = field(default_factory=dict)
    """New names of values that have changed theirs."""


@dataclass(frozen=True)
class Dropped:
    """A setting that is gone."""

    reason: str
    """What holds for every run instead."""
    only: tuple[Any, ...] | None = None
    """Values that mean just this; a run with another one cannot be repeated. None: all, for the setting never
    changed results."""


OLD_KEYS: dict[str, Moved | Dropped] = {
    "data.views.master_size": Moved("data.views.source_crop_size"),
    "model.mask_cell": Moved("model.mask_unit"),
    "run.picture_every": Moved("run.image_every"),
    "speed.target_shadow": Moved("speed.target_copy"),
    "model.conv_depth": Dropped("the hybrid encoder has two convolution blocks a stage", (2,)),
    "model.feature_dim": Dropped("features are as wide as the encoder", (None,)),
    "speed.hw_decoder_load": Moved("data.hw_decoder_load", {None: 0.65}),
    "speed.num_readers": Moved("data.num_readers", {None: 4}),
    "speed.num_threads": Moved("data.num_threads"),
    "speed.prefetch": Moved("data.prefetch", {None: 2}),
    "speed.view_backend": Moved("data.view_backend", {"host": "cpu"}),
    "speed.cuda_graphs": Dropped("speed.compile=model_graphs records CUDA graphs"),
    "speed.ddp_bucket_mb": Dropped("gradients are averaged in buckets of 25 MB"),
    "speed.ddp_static_graph": Dropped("it saved no time"),
    "speed.overlap_keys": Dropped("keys are always gathered while the online encoder runs"),
    "speed.tuned": Dropped("`cmae tune` writes a recipe, which a run names with --recipe"),
    "optim.min_lr": Dropped("the learning rate ends at 0", (0.0,)),
    "optim.target_fp8": Dropped("the target encoder computes in optim.precision", (False,)),
    "optim.warmup_start": Dropped("warmup starts from 1e-4 of the peak", (1e-4,)),
}
"""What became of each setting, by its old dotted key."""


class Updated(NamedTuple):
    """A configuration in the names of today."""

    settings: dict[str, Any]
    """Values by section and name; what this version cannot do is left where it was."""
    notes: list[str]
    """One line for each setting that was moved or dropped."""
    refused: list[str]
    """One line for each setting whose value this version cannot give."""


def update_keys(settings: Mapping[str, Any]) -> Updated:
    """Apply `OLD_KEYS` to a configuration as recipes and checkpoints hold it; new keys win over old ones."""
    updated = _copy(settings)
    notes, refused = [], []
    for key, value in list(_old_settings(settings)):
        *sections, name = key.split(".")
        new = OLD_KEYS[key]
        if isinstance(new, Dropped) and new.only is not None and value not in new.only:
            refused.append(f"{key}={value} is not possible any more: {new.reason}")
            continue
        del _section(updated, sections)[name]
        if isinstance(new, Moved):
            *sections, name = new.to.split(".")
            _section(updated, sections).setdefault(name, new_value(new, value))
        notes.append(what_became(key))
    return Updated(updated, notes, refused)


def what_became(key: str) -> str:
    """One line on an old key, for people."""
    new = OLD_KEYS[key]
    return f"{key} is {new.to} now" if isinstance(new, Moved) else f"{key} has gone: {new.reason}"


def new_value(moved: Moved, value: Any) -> Any:
    """The value of a moved setting under its present name."""
    return moved.values.get(value, value) if isinstance(value, str | None) else value


def _old_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if f"{prefix}{name}" in OLD_KEYS:
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _old_settings(value, f"{prefix}{name}.")


def _copy(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _copy(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
    }


def _section(settings: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        settings = settings.setdefault(name, {})
    return settings
