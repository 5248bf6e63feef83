"""What features look like without labels: rank, spectrum, alignment, uniformity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rank_me(features: Float[Tensor, "N D"]) -> float:
    """Effective rank, 1..min(N, D): exp of the entropy of the normalised singular values.

    Source: Garrido et al., arXiv 2210.02885 (RankMe).
    """
    return _effective_rank(torch.linalg.svdvals(features.float()))


def spectrum_slope(features: Float[Tensor, "N D"]) -> float:
    """Exponent a of the decay i^-a of the covariance's eigenvalues, fitted to the middle of the spectrum.

    Near 1 is said to be best; large is a collapse to few directions. Source: Agrawal et al., arXiv
    2202.05808.
    """
    centred = features.float() - features.float().mean(0)
    values = torch.linalg.svdvals(centred).square()
    values = values[values > 1e-10 * values[0].clamp_min(1e-30)]
    first, last = len(values) // 20, max(len(values) // 2, min(3, len(values)))
    if last - first < 2:
        return float("nan")
    x = torch.arange(first + 1, last + 1, device=values.device).log()
    y = values[first:last].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return -float(slope)


def alignment(first: Float[Tensor, "N D"], second: Float[Tensor, "N D"]) -> float:
    """Mean squared distance of two views' features on the unit sphere, 0..4; 0 is a perfect match.

    Source: Wang and Isola, arXiv 2005.10242.
    """
    distance = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return distance.square().sum(1).mean().item()


def uniformity(features: Float[Tensor, "N D"], *, most: int = 4096) -> float:
    """Log of the mean of exp(-2 d^2) over pairs at distance d on the unit sphere, -8..0; low is uniform.

    Source: Wang and Isola, arXiv 2005.10242. Features after the first `most` are left out.
    """
    unit = F.normalize(features[:most].float(), dim=1)
    squared = F.pdist(unit).square()
    return math.log(squared.mul(-2).exp().mean().item())


def _effective_rank(singular_values: Float[Tensor, " R"]) -> float:
    shares = singular_values / singular_values.sum().clamp_min(1e-30)
    return float(torch.special.entr(shares).sum().exp())
