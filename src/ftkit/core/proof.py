"""Is the merged model what was trained? Base + adapter against merged, by their logits on probe prompts.

Both sides compute in float32, so what differs is the rounding of the merged weights to their format, and nothing else.
The limits were measured on two small language models (260 thousand and 3.4 million parameters; small ones suffer most
from rounding), with LoRA, NF4 and LLM.int8 runs:

| format | right merges: difference / largest logit | their mean KL | same token |
|---|---|---|---|
| fp32 | up to 3e-6 | 1e-11 | 100 % |
| fp16 | up to 0.002 | 4e-6 | 99.6 % |
| bf16 | up to 0.05 | 9e-4 | 97.7 % |

Wrong ones (merged onto the unquantised weights, or quantised again) had a KL of 0.08 to 0.5. The limits lie several
times above what right merges show, and that of KL well below the wrong ones.

Legend: N compared positions, V vocabulary.
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
    "F64": Limits(relative=1e-3, mean_kl=1e-6, agreement=0.99),
    "F32": Limits(relative=1e-3, mean_kl=1e-6, agreement=0.99),
    "F16": Limits(relative=0.02, mean_kl=2e-4, agreement=0.97),
    "BF16": Limits(relative=0.25, mean_kl=0.01, agreement=0.90),
}
"""By the coarsest format among the changed tensors, as safetensors names it."""


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
        broken.append(
            f"a logit differs by {found.largest_difference:.3g} (limit {limits.relative * found.largest_logit:.3g})"
        )
    if not found.mean_kl <= limits.mean_kl:
        broken.append(f"mean KL is {found.mean_kl:.3g} (limit {limits.mean_kl:.3g})")
    allowed = (1 - limits.agreement) * found.positions + 1  # one position more: a tie may fall either way
    if not found.positions * (1 - found.agreement) <= allowed:
        broken.append(
            f"the likeliest token is the same at {found.agreement:.1%} of positions (limit {limits.agreement:.0%})"
        )
    return broken
