"""Is the merged model what was trained? Base + adapter against merged, by their logits on probe prompts.

Both sides compute in float32, so what differs is the rounding of the merged weights to their format, and nothing else.
The limits were measured on two small language models (260 thousand and 3.4 million parameters; small ones suffer most
from rounding), with LoRA, NF4 and LLM.int8 runs:

| format | right merges: difference / largest logit | their mean KL | same token |
|---|---|---|---|
| fp32 | up to 3e-6 | 1e-11 | 100 % |
| fp16 | up to 0.002 | 4e-6 | 99.6 % |
| bf16 | up to 0.05 (DoRA 0.08) | 9e-4 (5e-3) | 97.7 % (96.6 %) |

Wrong ones (merged onto the unquantised weights, or quantised again) had a KL of 0.08 to 0.5. The limits lie several
times above what right merges show, and that of KL well below the wrong ones. Larger updates can make a model so
sensitive that honest rounding moves it further: then the limits follow what rounding does to it (`widened`).

Legend: N compared positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftkit.core.loss import counted_logits

MOST_TOKENS = 256
"""Of all probe texts together: what a layer makes of them should be smaller than its weight, and each costs two
products with every weight."""
LONGEST_COMPARED = 64
"""Positions of a text that are compared: its last ones, where an answer stands."""
MOST_LOGITS = 1 << 23
LONGEST_PROMPT = 8
CONTINUED = 4
"""Tokens of a greedy continuation. Each but the first is a pass through all weights."""
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
MANTISSA_BITS = {"F16": 11, "BF16": 8}
TIMES_ROUNDING = 4.0
WIDEST = Limits(relative=1.0, mean_kl=0.05, agreement=0.8)
"""Whatever rounding does to a model: beyond this it is another one. Wrong merges begin at a KL of 0.08."""


def widened(limits: Limits, rounding: Difference) -> Limits:
    """Limits for a model that is unusually sensitive: several times what rounding otherwise does to it, up to WIDEST."""
    return Limits(
        relative=min(WIDEST.relative, max(limits.relative, TIMES_ROUNDING * rounding.relative)),
        mean_kl=min(WIDEST.mean_kl, max(limits.mean_kl, TIMES_ROUNDING * rounding.mean_kl)),
        agreement=max(WIDEST.agreement, min(limits.agreement, 1 - TIMES_ROUNDING * (1 - rounding.agreement))),
    )


def batched(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids, padded on the right with 0, int64 (B, T): attention is causal, so nothing before a pad sees it."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


@dataclass(frozen=True)
class Probes:
    """What both models are asked: texts, of whose last `compared` positions the logits are compared, and prompts that
    the reference continues greedily: their beginnings."""

    texts: list[list[int]]
    compared: int
    prompts: list[list[int]]


def plan_probes(texts: Sequence[Sequence[int]], vocabulary: int) -> Probes:
    """Cut what is too long: texts to their ends, MOST_TOKENS in all; positions, so that MOST_LOGITS are compared."""
    longest = max(1, MOST_TOKENS // len(texts))
    compared = min(LONGEST_COMPARED, max(1, MOST_LOGITS // (vocabulary * len(texts))))
    cut = [list(ids[-longest:]) for ids in texts]
    return Probes(cut, compared, [ids[:LONGEST_PROMPT] for ids in cut])


@torch.no_grad()
def reference_logits(model: Any, probes: Probes) -> tuple[list[Tensor], list[list[int]]]:
    """(logits float32 in parts (n, V), the greedy continuation of each prompt, CONTINUED tokens).

    Logits: at the compared positions of all texts, then, token by token, at the last position of every prompt.
    """
    compared, logits = first_logits(model, probes)
    found = [compared, logits]
    rows = [list(prompt) for prompt in probes.prompts]
    for step in range(CONTINUED):
        if step:
            logits = logits_at(model, rows, [(number, len(row) - 1) for number, row in enumerate(rows)])
            found.append(logits)
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
    return found, [row[-CONTINUED:] for row in rows]


@torch.no_grad()
def other_logits(model: Any, probes: Probes, continued: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits float32 of another model at the same positions, in parts (n, V); the reference's continuations are given."""
    rows = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(probes.prompts, continued, strict=True)]
    ends = [
        (number, len(prompt) - 1 + step) for step in range(1, CONTINUED) for number, prompt in enumerate(probes.prompts)
    ]
    return [*first_logits(model, probes), *torch.split(logits_at(model, rows, ends), len(rows))]


def first_logits(model: Any, probes: Probes) -> tuple[Tensor, Tensor]:
    """Logits (n, V), (prompts, V) float32 at the compared positions, and at the end of each prompt: one pass."""
    compared = compared_positions(probes.texts, probes.compared)
    ends = [(number, len(prompt) - 1) for number, prompt in enumerate(probes.prompts)]
    found = logits_at(model, probes.texts, [*compared, *ends])
    return found[: len(compared)], found[len(compared) :]


def compared_positions(texts: Sequence[Sequence[int]], compared: int) -> list[tuple[int, int]]:
    """(row, position) of the last `compared` positions of every text."""
    return [(row, at) for row, ids in enumerate(texts) for at in range(max(0, len(ids) - compared), len(ids))]


def logits_at(model: Any, rows: Sequence[Sequence[int]], positions: Sequence[tuple[int, int]]) -> Tensor:
    """Logits (N, V) float32 at (row, position) of rows of ids."""
    batch = batched(rows)
    width = batch.shape[1]
    return counted_logits(model, batch, torch.tensor([row * width + at for row, at in positions])).float()


def same_continuations(logits: Sequence[Tensor], continued: Sequence[Sequence[int]]) -> int:
    """How many prompts a model continues with the reference's tokens; logits as `other_logits` gives them."""
    tokens = torch.stack([step.argmax(-1) for step in logits[-CONTINUED:]], dim=1)  # (prompts, CONTINUED)
    return sum(own == list(theirs) for own, theirs in zip(tokens.tolist(), continued, strict=True))


def compare_logits(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Difference:
    """The difference between two models' logits at the same positions, in equal parts (n, V); KL is summed in float64."""
    positions, logit, difference, kl, same = 0, 0.0, 0.0, 0.0, 0
    at_once = max(1, (1 << 18) // reference[0].shape[-1])
    ours, theirs = ([part for piece in side for part in torch.split(piece, at_once)] for side in (reference, other))
    for p, q in zip(ours, theirs, strict=True):
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
