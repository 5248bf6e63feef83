"""Contrastive masked autoencoder: online branch, target branch and their losses."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmae.kernels.images import Images
from cmae.kernels.masked_mse import masked_mse
from cmae.model.config import PRESETS, ModelConfig
from cmae.model.decoder import Decoder
from cmae.model.encoder import VisionTransformer
from cmae.model.heads import Head
from cmae.model.hybrid import Encoder, HybridEncoder
from cmae.model.init import init_weights
from cmae.model.losses import Losses, contrastive_terms
from cmae.model.masking import complement
from cmae.model.pixels import to_config_normalisation
from cmae.model.target_copy import TargetCopy


def build_model(config: ModelConfig, *, seed: int | None = None) -> CMAE:
    """A freshly initialised model on the CPU, in training mode, target equal to online.

    Args:
        config: Sizes and losses of the model.
        seed: Seed of the weights, which leaves torch's global random state as it was; None draws
            from the global state.
    """
    if seed is None:
        model = CMAE(config)
        init_weights(model, None)
    else:
        with torch.random.fork_rng(devices=[]):
            model = CMAE(config)
        init_weights(model, torch.Generator().manual_seed(seed))
    model.reset_target()
    return model


def create_model(name: str, *, seed: int | None = None, **overrides: Any) -> CMAE:
    """A freshly initialised model on the CPU, in training mode, target equal to online.

    Args:
        name: Key of `PRESETS`, such as 'cmae_vit_b'.
        seed: Seed of the weights; None draws from torch's global random state.
        **overrides: Fields of `ModelConfig`, such as mask_ratio=0.75.

    Raises:
        ValueError: No preset has this name, or a field is out of range.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(
            f"there is no model {name!r}; did you mean {nearest!r}? The models are "
            f"{', '.join(PRESETS)}; build_model(ModelConfig(...)) makes any other."
        )
    return build_model(replace(PRESETS[name], **overrides), seed=seed)


class CMAE(nn.Module):
    """CMAE (arXiv 2207.13532, section 3) and, with the contrastive branch off, MAE.

    Parts that `config` switches off are None. `build_model` makes one with initial weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self.encoder = _build_encoder(config, final_norm=True)
        self.pixel_decoder: Decoder | None = None
        self.feature_decoder: Decoder | nn.Linear | None = None
        self.projector: Head | None = None
        self.predictor: Head | None = None
        self.target_encoder: Encoder | None = None
        self.target_projector: Head | None = None
        if config.has_reconstruction:
            self.pixel_decoder = Decoder(
                config, depth=config.decoder_depth, out_dim=config.patch_size**2 * 3
            )
        if config.has_contrast:
            self._build_contrast(config)

    def _build_contrast(self, config: ModelConfig) -> None:
        dim = config.embed_dim
        if config.feature_decoder == "own":
            self.feature_decoder = Decoder(config, depth=config.feature_decoder_depth, out_dim=dim)
        elif config.feature_decoder == "shared":
            self.feature_decoder = nn.Linear(config.decoder_embed_dim, dim)
        self.projector = Head(config, in_dim=dim)
        if config.predictor:
            self.predictor = Head(config, in_dim=config.proj_dim)
        self.target_encoder = _build_encoder(config, final_norm=config.target_final_norm)
        self.target_projector = copy.deepcopy(self.projector)
        self.target_encoder.requires_grad_(False)
        self.target_projector.requires_grad_(False)

    def forward(
        self,
        online: Images,
        target: Images | None,
        ids_keep: Int[Tensor, "B K"],
        *,
        ids_mask: Int[Tensor, "B M"] | None = None,
        keys: Float[Tensor, "G P"] | Callable[[], Float[Tensor, "G P"]] | None = None,
        label_offset: int = 0,
    ) -> Losses:
        """Losses of one (micro-)batch.

        Args:
            online: View whose visible patches are encoded and whose masked ones are predicted;
                uint8, or floats normalised with the standard mean and standard deviation.
            target: Second view of the same images; None if `keys` are given or contrast is off.
            ids_keep: Visible patches of `online`, distinct in each row.
            ids_mask: Masked patches, all the others; found from `ids_keep` when None.
            keys: Target projections of the global batch (`target_keys`, gathered over ranks), or a
                function that returns them, called when the loss needs them; computed from `target`
                when None.
            label_offset: Row of `keys` that belongs to the first image of this batch.

        Raises:
            ValueError: A shape or dtype does not fit the config, or keys and target are missing.
        """
        config = self.config
        check_images("online", online, config)
        check_ids(ids_keep, online, config)
        ids_mask = _masked_ids(ids_mask, ids_keep, config)
        latent = self.encoder(online, ids_keep)
        pixels, features = self._decode(latent, ids_keep, ids_mask)
        off = torch.zeros((), device=latent.device)
        reconstruction = off
        if pixels is not None:
            reconstruction = self._reconstruction_loss(pixels, online, ids_mask)
        total = config.reconstruction_weight * reconstruction
        if features is None:
            return Losses(total, reconstruction, off, off, off, off, off)
        if keys is None:
            keys = self._keys_of(target, ids_keep)
        elif not isinstance(keys, Tensor):
            keys = keys()
        query = self._project(features)
        terms = contrastive_terms(config, query, keys, label_offset=label_offset)
        return Losses(total + terms.scaled, reconstruction, *terms)

    @torch.no_grad()
    def target_keys(
        self,
        target: Images,
        ids_keep: Int[Tensor, "B K"] | None = None,
        *,
        target_copy: TargetCopy | None = None,
    ) -> Float[Tensor, "B P"]:
        """Unit projections of the target branch, float32, without gradient.

        Args:
            target: Second views; uint8, or floats normalised with the standard constants.
            ids_keep: Visible patches; needed, and used, only when target_input is 'visible'.
            target_copy: 16-bit copy of the target to compute with instead of the target itself.

        Raises:
            ValueError: The model has no target branch, or an argument is missing or does not fit.
        """
        if self.target_encoder is None or self.target_projector is None:
            raise ValueError("contrastive_loss='none': this model has no target branch.")
        check_images("target", target, self.config)
        if self.config.target_input == "full":
            ids_keep = None
        elif ids_keep is None:
            raise ValueError("ids_keep is None, but target_input='visible' needs it.")
        else:
            check_ids(ids_keep, target, self.config)
        encoder = self.target_encoder if target_copy is None else target_copy.encoder
        projector = self.target_projector if target_copy is None else target_copy.projector
        projected = projector(encoder.mean_tokens(target, ids_keep))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target: momentum * target + (1 - momentum) * online, parameter by parameter.

        Buffers stay: the target's batch norm keeps running statistics of its own, and fixed
        position embeddings are equal by construction.

        Raises:
            ValueError: `momentum` is not in 0..1, or the model has no target branch.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} is not in 0..1.")
        targets, onlines = self._target_pairs()
        torch._foreach_lerp_(targets, onlines, 1 - momentum)

    @torch.no_grad()
    def reset_target(self) -> None:
        """Make the target, if there is one, a copy of the online encoder and projector."""
        if self.config.has_contrast:
            torch._foreach_copy_(*self._find_target_pairs())

    @torch.no_grad()
    def reconstruct(self, online: Images, ids_keep: Int[Tensor, "B K"]) -> Float[Tensor, "B N row"]:
        """Predicted pixels of all patches, in patch order, rows in (py, px, channel) order.

        Values are in the space of the loss: with norm_pix_loss each patch has its own mean and
        scale; `cmae.model.export.images.to_pixels` takes them back to 0..255.

        Raises:
            ValueError: The model has no pixel decoder, or shapes do not fit.
        """
        if self.pixel_decoder is None:
            raise ValueError("reconstruction_weight=0: this model has no pixel decoder.")
        check_images("online", online, self.config)
        check_ids(ids_keep, online, self.config)
        ids_mask = complement(ids_keep, self.config.num_patches)
        decoder = self.pixel_decoder
        decoded = decoder(decoder.embed_tokens(self.encoder(online, ids_keep), ids_keep, ids_mask))
        rows: Tensor = decoder.head(decoded[:, self.config.num_prefix_tokens :])
        place = torch.cat([ids_keep.long(), ids_mask], dim=1).argsort(dim=1)
        return rows.gather(1, place[:, :, None].expand_as(rows))

    def features(
        self, images: Images, pool: Literal["mean", "cls"] = "mean"
    ) -> Float[Tensor, "B D"]:
        """Features of whole images after the final norm, in the model's dtype; nothing is masked.

        Args:
            images: uint8 (B, img_size, img_size, 3) in RGB order, or floats (B, 3, img_size, img_size), each
                channel normalised with `STANDARD_MEAN` and `STANDARD_STD` (of values 0..255). A model that
                was trained with other constants converts both itself.
            pool: Mean of the patch tokens, or the cls token.

        Raises:
            ValueError: `pool` is unknown, or 'cls' with an encoder that has no such token.
        """
        check_images("images", images, self.config)
        prefix = self.config.num_prefix_tokens
        if pool not in ("mean", "cls") or (pool == "cls" and not prefix):
            raise ValueError(f"pool={pool!r}: choose 'mean', or 'cls' for encoder='vit'.")
        tokens: Tensor = self.encoder(images)
        return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(dim=1)

    def _decode(
        self, latent: Tensor, ids_keep: Tensor, ids_mask: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predicted masked pixels (B, M, P*P*3) and mean features (B, D), None where off."""
        pixels, features = None, None
        num_mask = ids_mask.shape[1]
        if self.pixel_decoder is not None:
            x = self.pixel_decoder.embed_tokens(latent, ids_keep, ids_mask)
            if isinstance(self.feature_decoder, nn.Linear):
                decoded = self.pixel_decoder(x)
                pixels = self.pixel_decoder.head(decoded[:, -num_mask:])
                features = self.feature_decoder(self.pixel_decoder.mean_patches(decoded))
            else:
                pixels = self.pixel_decoder.predict_last(x, num_mask)
        if isinstance(self.feature_decoder, Decoder):
            decoder = self.feature_decoder
            decoded = decoder(decoder.embed_tokens(latent, ids_keep, ids_mask))
            features = decoder.head(decoder.mean_patches(decoded))
        elif self.config.has_contrast and self.feature_decoder is None:
            features = latent[:, self.config.num_prefix_tokens :].mean(dim=1)
        return pixels, features

    def _keys_of(self, target: Images | None, ids_keep: Tensor) -> Tensor:
        """Keys of the second views, which must be there for each image."""
        if target is None or len(target) != len(ids_keep):
            raise ValueError(
                f"target has {0 if target is None else len(target)} images and keys is None; "
                f"give the second views of the {len(ids_keep)} images, or keys."
            )
        return self.target_keys(target, ids_keep)

    def _project(self, features: Tensor) -> Tensor:
        assert self.projector is not None
        query: Tensor = self.projector(features)
        return query if self.predictor is None else self.predictor(query)

    def _reconstruction_loss(self, pixels: Tensor, online: Images, ids_mask: Tensor) -> Tensor:
        return masked_mse(
            pixels,
            to_config_normalisation(online, self.config),
            ids_mask,
            patch_size=self.config.patch_size,
            mean=self.config.pixel_mean,
            std=self.config.pixel_std,
            norm_pix=self.config.norm_pix_loss,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._pairs = None  # a move to a device or a dtype may put other parameters in place
        super()._apply(fn, recurse)
        return self

    def _target_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Target parameters and the online ones they follow, in the same order.

        Looked up once: a thousand names a step are a millisecond of the thread that launches the GPU's work.
        """
        if self._pairs is None:
            self._pairs = self._find_target_pairs()
        return self._pairs

    def _find_target_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        if self.target_encoder is None or self.target_projector is None:
            raise ValueError("contrastive_loss='none': this model has no target branch.")
        assert self.projector is not None
        targets: list[Tensor] = []
        onlines: list[Tensor] = []
        for follower, leader in (
            (self.target_encoder, self.encoder),
            (self.target_projector, self.projector),
        ):
            sources = dict(leader.named_parameters())
            for name, parameter in follower.named_parameters():
                if sources[name].requires_grad:
                    targets.append(parameter)
                    onlines.append(sources[name])
        return targets, onlines


def _build_encoder(config: ModelConfig, *, final_norm: bool) -> Encoder:
    kind = VisionTransformer if config.encoder == "vit" else HybridEncoder
    return kind(config, final_norm=final_norm)


def _masked_ids(ids_mask: Tensor | None, ids_keep: Tensor, config: ModelConfig) -> Tensor:
    """The given ids of masked patches, if their number is right; found from `ids_keep` when None."""
    if ids_mask is None:
        return complement(ids_keep, config.num_patches)
    if ids_mask.shape != (len(ids_keep), config.num_patches - ids_keep.shape[1]):
        raise ValueError(
            f"ids_mask has shape {tuple(ids_mask.shape)}; with ids_keep of shape "
            f"{tuple(ids_keep.shape)} it must name the other {config.num_patches} - "
            f"{ids_keep.shape[1]} patches, or be None."
        )
    return ids_mask


def check_images(name: str, images: Images, config: ModelConfig) -> None:
    """Raise a ValueError that names the argument unless `images` fits the config."""
    size = config.img_size
    expected = (size, size, 3) if images.dtype == torch.uint8 else (3, size, size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"{name} has shape {tuple(images.shape)} and dtype {images.dtype}; expected uint8 "
            f"(B, {size}, {size}, 3) or normalised floats (B, 3, {size}, {size})."
        )


def check_ids(ids_keep: Tensor, images: Tensor, config: ModelConfig) -> None:
    """Raise a ValueError unless `ids_keep` is (B, K) integers with 0 < K < num_patches."""
    integral = not ids_keep.is_floating_point() and ids_keep.dtype != torch.bool
    if not integral or ids_keep.ndim != 2 or len(ids_keep) != len(images):
        raise ValueError(
            f"ids_keep has shape {tuple(ids_keep.shape)} and dtype {ids_keep.dtype}; expected "
            f"integers ({len(images)}, K), one row per image."
        )
    if not 0 < ids_keep.shape[1] < config.num_patches:
        raise ValueError(
            f"ids_keep has {ids_keep.shape[1]} columns; it must keep at least 1 and mask at least "
            f"1 of {config.num_patches} patches."
        )
