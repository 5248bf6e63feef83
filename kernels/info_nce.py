"""Contrastive loss of queries against a bank of keys, in one direction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmae.kernels.backend import Backend, check_backend


def info_nce(
    query: Float[Tensor, "N D"],
    keys: Float[Tensor, "M D"],
    *,
    temperature: float,
    label_offset: int = 0,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(cos(query, keys) / temperature) (CMAE, equation of L_c).

    Args:
        query: any length; normalised to length 1 here.
        keys: as `query`; the bank of all ranks. Gets a gradient only if it requires one.
        temperature: divides the cosines; > 0.
        label_offset: the positive of row i is key i + label_offset (rank * batch size).
        backend: which implementation; see `cmae.kernels.backend`.

    Returns:
        float32 scalar, computed in float32 even under autocast (float64 stays float64).

    Raises:
        ValueError: shapes do not fit, or `temperature` or `label_offset` is out of range.
    """
    check_backend("info_nce", backend)
    if query.ndim != 2 or not query.is_floating_point():
        raise ValueError(
            f"query has shape {tuple(query.shape)} and dtype {query.dtype}; expected floats (N, D)."
        )
    if keys.ndim != 2 or keys.shape[1] != query.shape[1] or not keys.is_floating_point():
        raise ValueError(
            f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}; expected floats "
            f"(M, {query.shape[1]}), the width of query."
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0; the paper uses 0.07.")
    if label_offset < 0 or label_offset + query.shape[0] > keys.shape[0]:
        raise ValueError(
            f"label_offset={label_offset} with {query.shape[0]} rows of query needs keys "
            f"0..{label_offset + query.shape[0] - 1}, but keys has {keys.shape[0]} rows; pass "
            "rank * batch size and the bank gathered over all ranks."
        )
    return info_nce_reference(query, keys, temperature=temperature, label_offset=label_offset)


def info_nce_reference(
    query: Float[Tensor, "N D"],
    keys: Float[Tensor, "M D"],
    *,
    temperature: float,
    label_offset: int = 0,
) -> Float[Tensor, ""]:
    """`info_nce` in plain torch; holds the (N, M) logits."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would run the product in 16 bits, where a logit of 14 (1 / .07) is off by .004.
    with torch.autocast(query.device.type, enabled=False):
        unit_query = F.normalize(query.to(dtype), dim=1)
        unit_keys = F.normalize(keys.to(dtype), dim=1)
        logits = unit_query @ unit_keys.T / temperature
        labels = torch.arange(len(query), device=query.device) + label_offset
        return F.cross_entropy(logits, labels)
