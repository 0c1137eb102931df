"""Adapter + base -> merged weights: the arithmetic of one tensor.

LoRA, arXiv:2106.09685, section 4.1: W + (alpha / r) B A. rsLoRA, arXiv:2312.03732: alpha / sqrt(r) instead.
DoRA, arXiv:2402.09353, section 4.1: m (W + scale B A) / ||W + scale B A||, the norm taken over each output's inputs.
Legend: r rank; a weight is (out, in), or (in, out) where it lies the other way round.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VALUES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class LowRank:
    """One layer's update: scale * b @ a, with a (r, in) and b (out, r) of any floating-point format.

    transposed: the base's weight lies as (in, out): GPT-2's Conv1D, embeddings. magnitude: DoRA's m (out,).
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None


def delta(update: LowRank) -> Tensor:
    """scale * B A in float32, lying as the base's weight does.

    The product is made whole and scaled afterwards, as PEFT does: equal to PEFT's to the last bit.
    """
    return unscaled_delta(update).mul_(update.scale)


def unscaled_delta(update: LowRank) -> Tensor:
    """B A in float32, lying as the base's weight does."""
    product = update.b.float() @ update.a.float()
    return product.T.contiguous() if update.transposed else product


def apply_delta(weight: Tensor, update: LowRank) -> Tensor:
    """weight + delta (DoRA: brought to its magnitudes), float32, not yet rounded.

    weight: any floating-point format; it is left as it is.
    Scaled and added in parts that fit into a processor's cache; of a whole 16-bit weight torch would make a float32 copy.
    """
    merged = unscaled_delta(update)
    rows = max(1, VALUES_AT_ONCE // max(1, weight[:1].numel()))
    for part, own in zip(torch.split(merged, rows), torch.split(weight, rows), strict=True):
        part.mul_(update.scale).add_(own)
    return merged if update.magnitude is None else with_magnitude(merged, update.magnitude, update.transposed)


def merge_rows(own: Tensor, a: Tensor, b: Tensor, scale: float, merged: Tensor) -> None:
    """Put own + scale * b a, rounded once, into `merged`. own, merged (n, in): any floating-point format; a (r, in) and b
    (n, r): float32.

    In equal parts that fit into a processor's cache. MKL's products of some rows are those rows of the whole product, to
    the bit (500 combinations of shape and rank); single rows and columns are not.
    """
    parts = max(1, min(len(own), -(-own.numel() // VALUES_AT_ONCE)))
    for rows, factors, place in zip(*(tensor.tensor_split(parts) for tensor in (own, b, merged)), strict=True):
        part = torch.mm(factors, a).mul_(scale)
        place.copy_(part.add_(rows.float() if rows.itemsize == 2 else rows))  # of two formats torch adds slowly


def with_magnitude(direction: Tensor, magnitude: Tensor, transposed: bool) -> Tensor:
    """DoRA: every output's weights get the norm that was trained; in place. direction: float32, as the base's lies."""
    upright = direction.T if transposed else direction  # (out, in)
    factor = magnitude.float() / torch.linalg.norm(upright, dim=1)
    return direction.mul_(factor if transposed else factor.unsqueeze(1))


def adapter_scale(config: Mapping[str, Any], module: str) -> float:
    """The factor of B A for a layer: alpha / r, or alpha / sqrt(r) for rsLoRA; patterns name layers with their own."""
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    rank = adapter_rank(config, module)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank that adapter_config.json gives a layer."""
    return int(by_pattern(config.get("rank_pattern"), module, config["r"]))


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def is_zero(tensor: Tensor) -> bool:
    """True if every value is 0."""
    return not bool(torch.any(tensor))
