"""What one training step reports, and the contrastive terms in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmae.kernels.info_nce import info_nce
from cmae.model.config import ModelConfig


class Losses(NamedTuple):
    """Scalars of a step, float32, on the device; parts that are off are 0."""

    total: Float[Tensor, ""]
    """What to differentiate: reconstruction_weight * reconstruction + contrastive."""
    reconstruction: Float[Tensor, ""]
    """Mean squared pixel error on masked patches, unweighted."""
    contrastive_raw: Float[Tensor, ""]
    """Contrastive loss before any factor: cross-entropy, nats (2 - 2 cos for 'byol')."""
    contrastive: Float[Tensor, ""]
    """`contrastive_raw` times contrastive_weight (and 2 * temperature): its share of `total`."""
    positive_similarity: Float[Tensor, ""]
    """Mean cosine between a query and its own key; detached."""
    negative_similarity: Float[Tensor, ""]
    """Mean cosine between a query and the other keys; detached."""
    feature_std: Float[Tensor, ""]
    """Standard deviation over the batch of the unit queries, mean over channels; detached.
    About 1 / sqrt(proj_dim) when spread out, 0 when collapsed."""


class ContrastiveTerms(NamedTuple):
    """The contrastive part of `Losses`, in its order."""

    raw: Float[Tensor, ""]
    scaled: Float[Tensor, ""]
    positive_similarity: Float[Tensor, ""]
    negative_similarity: Float[Tensor, ""]
    feature_std: Float[Tensor, ""]


def contrastive_terms(
    config: ModelConfig,
    query: Float[Tensor, "B P"],
    keys: Float[Tensor, "M P"],
    *,
    label_offset: int,
) -> ContrastiveTerms:
    """Loss of `query` against `keys`, whose row i + label_offset is the positive of row i.

    Args:
        config: Loss, temperature and weights.
        query: Predictions of the online branch, any length.
        keys: Projections of the target branch, unit length; get no gradient.
        label_offset: First row of this rank's keys.

    Raises:
        ValueError: `keys` has the wrong shape, or too few rows for `label_offset`.
    """
    last_row = label_offset + len(query)
    if keys.ndim != 2 or keys.shape[1] != query.shape[1] or not len(query) <= last_row <= len(keys):
        raise ValueError(
            f"keys has shape {tuple(keys.shape)}; with label_offset={label_offset} and "
            f"{len(query)} images it must be (M, {query.shape[1]}) with M >= {last_row}."
        )
    keys = keys.detach()
    dtype = torch.promote_types(query.dtype, torch.float32)
    unit_query, unit_keys = F.normalize(query.to(dtype), dim=1), keys.to(dtype)
    rows = torch.arange(len(query), device=query.device) + label_offset
    cosine = (unit_query * unit_keys[rows]).sum(dim=1)
    if config.contrastive_loss == "info_nce":
        raw = info_nce(query, keys, temperature=config.temperature, label_offset=label_offset)
        factor = 2 * config.temperature if config.two_tau_factor else 1.0
    else:
        raw, factor = (2 - 2 * cosine).mean(), 1.0
    with torch.no_grad():
        # Sum over all keys in one dot product: the (B, M) matrix of cosines is not needed.
        negative = ((unit_query * unit_keys.sum(dim=0)).sum(dim=1) - cosine).mean()
        negative = negative / max(len(keys) - 1, 1)
        spread = unit_query.std(dim=0, correction=0).mean()
    scaled = config.contrastive_weight * factor * raw
    return ContrastiveTerms(raw, scaled, cosine.detach().mean(), negative, spread)
