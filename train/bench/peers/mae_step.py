"""MAE's pretraining step as its public code does it: timm blocks, masks by argsort, torch's autocast.

Written from the paper (arXiv 2111.06377) and the settings of facebookresearch/mae. It computes what our step
computes with `model.contrastive_loss: none`, so the two rates compare.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cmae.model import ModelConfig
from cmae.train.bench.peers.contract import MEAN, STD
from cmae.train.config import OptimConfig


class PlainMae(nn.Module):
    """Encoder of the visible patches, decoder of all, mean squared error of normalised masked patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, narrow, patch = config.embed_dim, config.decoder_embed_dim, config.patch_size
        self.patch, self.num_patches, self.num_keep = patch, config.num_patches, config.num_keep
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(
            torch.zeros(1, self.num_patches + 1, width), requires_grad=False
        )
        self.encoder = _blocks(config.depth, width, config.num_heads)
        self.encoder_norm = nn.LayerNorm(width)
        self.to_decoder = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder_position = nn.Parameter(
            torch.zeros(1, self.num_patches + 1, narrow), requires_grad=False
        )
        self.decoder = _blocks(config.decoder_depth, narrow, config.decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(narrow)
        self.predict = nn.Linear(narrow, 3 * patch**2)

    def forward(self, images: Tensor) -> Tensor:
        """Loss of float images (B, 3, S, S)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position[:, 1:]
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)
        back = order.argsort(1)
        kept = order[:, : self.num_keep, None].expand(-1, -1, tokens.shape[2])
        cls = (self.cls + self.position[:, :1]).expand(len(tokens), -1, -1)
        latent = self.encoder_norm(self.encoder(torch.cat([cls, tokens.gather(1, kept)], 1)))
        latent = self.to_decoder(latent)
        masks = self.mask_token.expand(len(latent), self.num_patches - self.num_keep, -1)
        rest = torch.cat([latent[:, 1:], masks.to(latent.dtype)], 1)
        rest = rest.gather(1, back[:, :, None].expand(-1, -1, rest.shape[2]))
        whole = torch.cat([latent[:, :1], rest], 1) + self.decoder_position
        predicted = self.predict(self.decoder_norm(self.decoder(whole)))[:, 1:]
        patches = _patchify(images, self.patch)
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        error = (predicted - (patches - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
        is_masked = (back >= self.num_keep).float()
        loss: Tensor = (error * is_masked).sum() / is_masked.sum()
        return loss


class MaeStep:
    """The step; a call takes uint8 images (B, S, S, 3) on the device through one optimiser step."""

    def __init__(self, config: ModelConfig, optim: OptimConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = PlainMae(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, betas=(0.9, 0.95))
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = dtypes.get(optim.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")
        self.device = device
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def __call__(self, images: Tensor) -> None:
        """Take one step."""
        pixels = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.model(pixels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def _blocks(depth: int, width: int, heads: int) -> nn.Sequential:
    return nn.Sequential(
        *(Block(width, heads, 4.0, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))
    )


def _patchify(images: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
