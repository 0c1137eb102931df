"""Is the merged model what was trained? Base + adapter against merged, by their logits on probe prompts.

Legend: N compared positions, V vocabulary. Both sides compute in float32, so what differs is the rounding of the merged
weights to their format, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftkit.core.loss import counted_logits

LONGEST_PROBE_TOKENS = 256
LONGEST_COMPARED = 64
"""Positions of a probe that are compared: its last ones, where an answer stands."""
PLAIN_PROBES = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain in simple words why the sky is blue.",
    "Below is an instruction that describes a task.\n\n### Instruction:\nName three fruits.\n\n### Response:\n",
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Question: What is 17 + 25?\nAnswer:",
    '{"name": "Alice", "age": 30, "city": "',
    "Once upon a time, there was a little girl named",
)


@dataclass(frozen=True)
class Difference:
    """How far one model's next-token distributions are from a reference's, over `positions` of them.

    largest_logit, largest_difference: of absolute values. mean_kl: KL(reference || other) in nats. agreement: share of
    positions where both find the same token likeliest.
    """

    positions: int
    largest_logit: float
    largest_difference: float
    mean_kl: float
    agreement: float

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest_difference / max(self.largest_logit, 1e-30)


@dataclass(frozen=True)
class Limits:
    """What is still rounding: beyond any of these a merge is not published."""

    relative: float
    mean_kl: float
    agreement: float


LIMITS = {
    "F64": Limits(1e-3, 1e-6, 0.99),
    "F32": Limits(1e-3, 1e-6, 0.99),
    "F16": Limits(0.05, 0.005, 0.95),
    "BF16": Limits(0.25, 0.05, 0.80),
}


@torch.no_grad()
def probe_logits(model: Any, probes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits (N, V) float32 at the last positions of each probe, the model in evaluation mode."""
    found = []
    for ids in probes:
        positions = torch.arange(max(0, len(ids) - LONGEST_COMPARED), len(ids))
        found.append(counted_logits(model, torch.tensor([list(ids)]), positions).float())
    return found


def compare_logits(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Difference:
    """The difference between two models' logits (N, V) of the same probes; KL is summed in float64."""
    positions, logit, difference, kl, same = 0, 0.0, 0.0, 0.0, 0
    for p, q in zip(reference, other, strict=True):
        positions += len(p)
        logit = max(logit, float(p.abs().max()))
        difference = max(difference, float((p - q).abs().max()))
        log_p, log_q = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Difference(positions, logit, difference, max(kl, 0.0) / positions, same / positions)


def broken_limits(found: Difference, limits: Limits) -> list[str]:
    """What is beyond its limit, in words; NaN is beyond every limit."""
    broken = []
    if not found.relative <= limits.relative:
        broken.append(f"a logit differs by {found.largest_difference:.3g} (limit {limits.relative * found.largest_logit:.3g})")
    if not found.mean_kl <= limits.mean_kl:
        broken.append(f"mean KL is {found.mean_kl:.3g} (limit {limits.mean_kl:.3g})")
    if not found.agreement >= limits.agreement:
        broken.append(f"the likeliest token is the same at {found.agreement:.1%} of positions (limit {limits.agreement:.0%})")
    return broken
