"""Encoders of any origin under one roof: blocks of tokens from uint8 images."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmae.errors import CmaeError
from cmae.model import (
    CMAE,
    ModelConfig,
    build_model,
    from_authors,
    from_convmae,
    from_mae,
    load_model,
    to_timm,
)
from cmae.model.config import STANDARD_MEAN, STANDARD_STD
from cmae.model.export.checkpoints import encoder_of
from cmae.model.export.stored import is_checkpoint, read_file
from cmae.model.hybrid import HybridEncoder, set_drop_path
from cmae.train.config_parser import load_recipe, nearest, recipe_names

Branch = Literal["online", "target"]

_FORMS = (
    "a run's folder, a checkpoint, an exported encoder, a .pth of the authors' code, of MAE or of ConvMAE, "
    "random:RECIPE, or timm:NAME=FILE"
)


class Encoder(nn.Module):
    """A vision transformer without head, and what its images must look like.

    Args:
        vit: The network, timm's or a `HybridEncoder`, for images normalised with `mean` and `std`.
        name: Origin, for tables.
        mean: Means of the channels, of values 0..255.
        std: Their deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        *,
        name: str,
        mean: tuple[float, ...] = STANDARD_MEAN,
        std: tuple[float, ...] = STANDARD_STD,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.name = name
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def img_size(self) -> int:
        """Side of its images, px."""
        if isinstance(self.vit, HybridEncoder):
            return self.vit.config.img_size
        return int(self.vit.patch_embed.img_size[0])  # type: ignore[union-attr, index]

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)  # type: ignore[arg-type]

    @property
    def has_cls(self) -> bool:
        """Whether there is a cls token."""
        return bool(self.vit.num_prefix_tokens)

    def normalise(self, images: UInt8[Tensor, "B S S 3"]) -> Float[Tensor, "B 3 S S"]:
        """The images as the network takes them."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(
        self, images: UInt8[Tensor, "B S S 3"], *, last: int = 1
    ) -> dict[tuple[str, int], Float[Tensor, "B D"]]:
        """Pooled tokens of the last blocks after the final norm.

        Args:
            images: Pixels on the network's device.
            last: How many of the last blocks.

        Returns:
            By pool ('mean' of the patch tokens, 'cls') and block (1 is the last one, the only one of a
            hybrid encoder, whose last block's tokens have the stages' features added).
        """
        pixels = self.normalise(images)
        if isinstance(self.vit, HybridEncoder):
            return {("mean", 1): self.vit.mean_tokens(pixels)}
        found = self.vit.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=min(last, self.depth),
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        pooled = {}
        for block, (patches, prefix) in enumerate(reversed(found), start=1):
            pooled["mean", block] = patches.mean(1)
            if prefix.shape[1]:
                pooled["cls", block] = prefix[:, 0]
        return pooled

    def digest(self) -> str:
        """Identity of the weights and constants."""
        total = hashlib.sha256()
        for name, value in sorted(
            {**self.state_dict(), "mean": self.mean, "std": self.std}.items()
        ):
            total.update(name.encode())
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()[:16]


def load_encoder(
    source: str | Path, *, branch: Branch = "online", img_size: int | None = None, **options: Any
) -> Encoder:
    """An encoder in evaluation mode on the CPU.

    Args:
        source: A run's folder, a checkpoint, an exported encoder, a file of the authors' code, MAE, ConvMAE;
            'random:RECIPE' for a recipe's encoder with its initial weights (':SEED' behind it for another
            seed); 'timm:NAME=FILE' for a network of timm with weights in a local file.
        branch: 'online', or 'target' for the moving average of a checkpoint that has one.
        img_size: Side of the images, px; position embeddings are interpolated. None: as trained.
        options: Arguments of timm's VisionTransformer, such as drop_path_rate.

    Raises:
        CmaeError: It is none of these, or has no such branch.
    """
    text = str(source)
    if text.startswith("random:"):
        model, name = _random(text.removeprefix("random:")), text
    elif text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"), img_size, options)
    else:
        model, name = _load_any(Path(text)), text
    return from_model(model, name=name, branch=branch, img_size=img_size, **options)


def from_model(
    model: CMAE,
    *,
    name: str,
    branch: Branch = "online",
    img_size: int | None = None,
    **options: Any,
) -> Encoder:
    """The encoder of a model; see `load_encoder`."""
    if model.config.encoder == "hybrid":
        return Encoder(_hybrid(model, branch, img_size, **options), name=name).eval()
    config, state = model.config, to_timm(model, branch=branch)
    has_norm = "norm.weight" in state
    vit = build_vit(config, final_norm=has_norm, img_size=img_size, **options)
    grid = (vit.patch_embed.img_size[0] // config.patch_size,) * 2
    state["pos_embed"] = interpolate_positions(state["pos_embed"], grid)
    vit.load_state_dict(state, strict=True)
    return Encoder(vit, name=name).eval()


def _hybrid(
    model: CMAE, branch: Branch, img_size: int | None, *, drop_path_rate: float = 0.0
) -> HybridEncoder:
    """A hybrid encoder at another image size, with stochastic depth."""
    source = encoder_of(model, branch)
    assert isinstance(source, HybridEncoder)
    config = replace(source.config, img_size=img_size or source.config.img_size)
    state = source.state_dict()
    has_norm = "norm.weight" in state
    state["pos_embed"] = interpolate_positions(state["pos_embed"], config.grid, num_prefix_tokens=0)
    encoder = HybridEncoder(config, final_norm=has_norm)
    if source.fuse is None:
        encoder.drop_features()
    encoder.load_state_dict(state)
    set_drop_path(encoder, drop_path_rate)
    return encoder


def build_vit(
    config: ModelConfig, *, final_norm: bool = True, img_size: int | None = None, **options: Any
) -> VisionTransformer:
    """Timm's VisionTransformer of a configuration's sizes, without head."""
    settings: dict[str, Any] = {
        "img_size": img_size or config.img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": 0,
        "global_pool": "token",
        "final_norm": final_norm,
    }
    return VisionTransformer(**{**settings, **options})


def interpolate_positions(
    table: Float[Tensor, "1 T D"], grid: tuple[int, int], *, num_prefix_tokens: int = 1
) -> Float[Tensor, "1 U D"]:
    """Position embeddings for another grid: the cls token's stays, the others' bicubic, as MAE does it.

    Args:
        table: Embeddings of the prefix tokens and a square grid of patches.
        grid: Rows and columns wanted.
        num_prefix_tokens: 1 for a cls token, 0 for none.
    """
    cls, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    side = round(patches.shape[1] ** 0.5)
    if (side, side) == grid:
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _random(recipe: str) -> CMAE:
    name, _, seed = recipe.rpartition(":")
    if not seed.isdigit():
        name, seed = recipe, "0"
    if not name or (name not in recipe_names() and not Path(name).is_file()):
        raise CmaeError(
            f"random:{recipe} names no recipe: give a YAML file, or one of {', '.join(recipe_names())}"
            f"{nearest(name, recipe_names())}"
        )
    return build_model(load_recipe(name).model, seed=int(seed))


def _from_timm(text: str, img_size: int | None, options: dict[str, Any]) -> Encoder:
    name, _, file = text.partition("=")
    if name not in timm.list_models(name):
        raise CmaeError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    more: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if file:
        more["checkpoint_path"] = file
    try:
        vit = timm.create_model(name, num_classes=0, **more, **options)
    except Exception as error:  # a broken file, or a network that is no transformer
        raise CmaeError(f"timm:{text} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise CmaeError(f"timm:{name} is a {type(vit).__name__}; it must be a VisionTransformer")
    cfg: Any = vit.pretrained_cfg
    mean, std = (tuple(255 * float(value) for value in cfg[key]) for key in ("mean", "std"))
    label = f"timm:{name}" + ("" if file else " (random weights)")
    return Encoder(vit, name=label, mean=mean, std=std).eval()


def _load_any(path: Path) -> CMAE:
    """A model of this project's file, or of the authors' or MAE's, told by its names."""
    if path.is_dir() or not path.is_file():
        return load_model(path)
    state = read_file(path)
    names = ("patch_embed.proj.weight", "patch_embed1.proj.weight")
    if is_checkpoint(state) or any(name in state for name in names):
        return load_model(path)
    # The authors' own weights take BGR; `cmae import` has an option for others.
    for convert in (from_mae, from_convmae, partial(from_authors, channel_order="bgr")):
        try:
            return convert(state)
        except ValueError:
            continue
    raise CmaeError(f"{path} is no encoder that is known here: give {_FORMS}")
