"""What an encoder sees: nearest neighbours, attention, a map of its features."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from matplotlib import colormaps
from PIL import Image, ImageDraw
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmae.train.evaluation.encoders import Encoder

TILE = 72
"""Side of a small picture, px."""
RIGHT, WRONG, PLAIN = (46, 160, 67), (207, 34, 46), (140, 148, 158)


def neighbours_picture(
    images: UInt8[Tensor, "N S S 3"],
    labels: Int64[Tensor, " N"],
    features: Float[Tensor, "N D"],
    *,
    queries: int = 10,
    shown: int = 8,
) -> bytes:
    """PNG: a query in each row, then its nearest images by cosine, framed by whether the class is the same.

    Args:
        images: Pictures, of which the queries are spread evenly.
        labels: Their classes.
        features: Features of the same images.
        queries: Number of rows.
        shown: Neighbours in a row.
    """
    unit = F.normalize(features.float(), dim=1)
    rows = torch.linspace(0, len(images) - 1, min(queries, len(images))).long().tolist()
    gap = 6
    width = (shown + 1) * (TILE + gap) + 3 * gap
    sheet = Image.new("RGBA", (width, len(rows) * (TILE + gap) + gap), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        found = (unit @ unit[row]).topk(min(shown + 1, len(images))).indices.tolist()
        for place, one in enumerate([row, *[other for other in found if other != row][:shown]]):
            left = gap + place * (TILE + gap) + (2 * gap if place else 0)
            top = gap + line * (TILE + gap)
            same = RIGHT if labels[one] == labels[row] else WRONG
            frame = same if place else PLAIN
            pen.rectangle((left - 2, top - 2, left + TILE + 1, top + TILE + 1), fill=(*frame, 255))
            sheet.paste(_tile(images[one]), (left, top))
    return _png(sheet)


@torch.no_grad()
def attention_picture(
    encoder: Encoder, images: UInt8[Tensor, "N S S 3"], *, shown: int = 8
) -> bytes:
    """PNG: images, and under each what the cls token attends to in the last block, mean of the heads.

    Raises:
        ValueError: The encoder has no cls token, or its blocks are not timm's.
    """
    vit = encoder.vit
    if not isinstance(vit, VisionTransformer) or not encoder.has_cls:
        raise ValueError("attention is drawn for a ViT with a cls token")
    chosen = images[torch.linspace(0, len(images) - 1, min(shown, len(images))).long()]
    maps = _cls_attention(vit, encoder.normalise(chosen))
    gap = 6
    sheet = Image.new(
        "RGBA", (len(chosen) * (TILE + gap) + gap, 2 * (TILE + gap) + gap), (0, 0, 0, 0)
    )
    colours = colormaps["inferno"]
    for place, (image, weights) in enumerate(zip(chosen, maps, strict=True)):
        left = gap + place * (TILE + gap)
        sheet.paste(_tile(image), (left, gap))
        shares = weights / weights.max().clamp_min(1e-12)
        painted = (255 * colours(shares.numpy())[..., :3]).astype(np.uint8)
        heat = Image.fromarray(painted).resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(heat, (left, gap + TILE + gap))
    return _png(sheet)


def _cls_attention(vit: VisionTransformer, pixels: Tensor) -> Float[Tensor, "N G G"]:
    """Attention of the cls token to the patches in the last block, as a grid; the mean of its heads."""
    seen: list[Tensor] = []
    last: Any = vit.blocks[-1]
    handle = last.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vit.forward_features(pixels)
    handle.remove()
    tokens, attention = seen[0], last.attn
    batch, count, width = tokens.shape
    heads = attention.num_heads
    qkv = attention.qkv(tokens).reshape(batch, count, 3, heads, width // heads)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    weights: Tensor = (query[:, :, :1] @ key.transpose(-2, -1) / (width // heads) ** 0.5).softmax(
        -1
    )
    prefix = vit.num_prefix_tokens
    side = round((count - prefix) ** 0.5)
    return weights[:, :, 0, prefix:].mean(1).reshape(batch, side, side)


def feature_map(
    images: UInt8[Tensor, "N S S 3"],
    features: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"],
    *,
    side: int = 900,
    most: int = 400,
) -> bytes:
    """PNG: thumbnails at the first two principal components of the features, framed in their class's colour.

    Args:
        images: Pictures.
        features: Features of the same images.
        labels: Their classes.
        side: Width and height, px.
        most: Images to show, spread evenly.
    """
    rows = torch.linspace(0, len(images) - 1, min(most, len(images))).long().unique()
    chosen = features[rows].float()
    centred = (chosen - chosen.mean(0)) / chosen.std(0).clamp_min(1e-6)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    places = left[:, :2] * values[:2]
    # Ranks spread what would lie on a heap.
    ranks = places.argsort(0).argsort(0).double() / max(1, len(rows) - 1)
    thumb = 34
    sheet = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    palette = colormaps["tab20"]
    for row, (x, y) in zip(rows.tolist(), ranks.tolist(), strict=True):
        at = (round(2 + x * (side - thumb - 4)), round(2 + (1 - y) * (side - thumb - 4)))
        colour = tuple(round(255 * part) for part in palette(int(labels[row]) % 20)[:3])
        pen.rectangle(
            (at[0] - 2, at[1] - 2, at[0] + thumb + 1, at[1] + thumb + 1), fill=(*colour, 255)
        )
        sheet.paste(_tile(images[row], thumb), at)
    return _png(sheet)


def _tile(image: UInt8[Tensor, "S S 3"], side: int = TILE) -> Image.Image:
    smooth = Image.Resampling.BICUBIC if image.shape[0] > side else Image.Resampling.NEAREST
    return Image.fromarray(image.cpu().numpy()).resize((side, side), smooth)


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
