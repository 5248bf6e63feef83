"""Models by name: the network, mask and losses of the recipes of the same names."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from cmae.errors import CmaeError
from cmae.model.cmae import CMAE, build_model
from cmae.model.config import ModelConfig

_MAE = ModelConfig(mask_ratio=0.75, mask_unit=1, contrastive_loss="none", pos_embed_order="column")

PRESETS: dict[str, ModelConfig] = {
    "cmae_vit_s": ModelConfig(embed_dim=384, num_heads=6),
    "cmae_vit_b": ModelConfig(),
    "cmae_vit_b_paper": ModelConfig(mask_ratio=0.75, mask_unit=1, two_tau_factor=False),
    "cmae_vit_l": ModelConfig(embed_dim=1024, depth=24, num_heads=16),
    "cmae_vit_h": ModelConfig(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
    "mae_vit_b": _MAE,
    "mae_vit_l": replace(_MAE, embed_dim=1024, depth=24, num_heads=16),
}
"""Configurations by name."""


def create_model(name: str, *, seed: int | None = None, **overrides: Any) -> CMAE:
    """A freshly initialised model on the CPU, in training mode, target equal to online.

    Args:
        name: Key of `PRESETS`, such as 'cmae_vit_b'.
        seed: Seed of the weights; None draws from torch's global random state.
        **overrides: Fields of `ModelConfig`, such as mask_ratio=0.75.

    Raises:
        CmaeError: No preset has this name, or a field is out of range.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise CmaeError(
            f"there is no model {name!r}; did you mean {nearest!r}? The models are "
            f"{', '.join(PRESETS)}; build_model(ModelConfig(...)) makes any other."
        )
    return build_model(replace(PRESETS[name], **overrides), seed=seed)
