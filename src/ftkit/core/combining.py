"""Several low-rank updates of one layer -> one, with PEFT's own arithmetic (LoraModel.add_weighted_adapter).

Sums: task arithmetic, arXiv:2212.04089. TIES: arXiv:2306.01708. DARE: arXiv:2311.03099.
`cat` and `svd` sum the updates themselves (svd rounds to a rank), the others sum A and B apart, which is not the same.
Legend: r rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ftkit.core.merging import LowRank, delta

EQUAL_RANKS = ("linear", "ties", "dare-ties")
"""Ways that add A to A and B to B, so that ranks must be equal."""


def combine_updates(
    updates: Sequence[LowRank], weights: Sequence[float], way: str, *, rank: int, density: float
) -> tuple[Tensor, Tensor]:
    """(A (r, in), B (out, r)), float32, of an update of scale 1. rank: of svd. density: share of values that ties and
    dare-ties keep (dare-ties at random: torch's generator decides)."""
    if way == "cat":
        return concatenated(updates, weights)
    if way == "svd":
        return cut_to_rank(updates, weights, rank)
    return combined_factors(updates, weights, way, density)


def concatenated(updates: Sequence[LowRank], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The exact sum: factors side by side, of the sum of all ranks."""
    pairs = list(zip(updates, weights, strict=True))
    a = torch.cat([update.a.float() * weight * update.scale for update, weight in pairs])
    return a, torch.cat([update.b.float() for update in updates], dim=1)


def cut_to_rank(updates: Sequence[LowRank], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """The sum's best approximation of this rank."""
    from peft.utils.merge_utils import task_arithmetic

    total = task_arithmetic([delta(update) for update in updates], torch.tensor(weights))  # (out, in)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return v[:rank].contiguous(), u[:, :rank] @ torch.diag(s[:rank])


def combined_factors(
    updates: Sequence[LowRank], weights: Sequence[float], way: str, density: float
) -> tuple[Tensor, Tensor]:
    """A with A and B with B, each times the root of weight and scale; a negative sign goes to A alone."""
    from peft.utils.merge_utils import dare_ties, task_arithmetic, ties

    shares = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(share)) for share in shares]
    signed = [root if share >= 0 else -root for root, share in zip(roots, shares, strict=True)]
    found = []
    for factors, own in (([u.a.float() for u in updates], signed), ([u.b.float() for u in updates], roots)):
        if way == "linear":
            found.append(task_arithmetic(factors, torch.tensor(own)))
        else:
            found.append((ties if way == "ties" else dare_ties)(factors, torch.tensor(own), density))
    return found[0], found[1]
