"""eval's generation and likelihoods against plain loops: python bench/eval.py [--rounds 3] [--prompts 64] [--new 32]

A Llama of 58 M random weights (bfloat16). 64 prompts of alpaca's lengths behind a preamble of 40 tokens, or behind a
system prompt of 600; `--new` tokens each, greedy. The ways take turns; medians of processor seconds
(run it with OMP_NUM_THREADS=1: on a shared machine the wall clock measures the neighbours) and the ratio to
`model.generate` one prompt at a time are printed, and how many answers are those of that loop (in bfloat16 batches may
round a near tie the other way). Also the likelihood of 77 labels behind each of two prompts, one by one and packed.
Only the ratios of one run count: machines and moments differ.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import set_verbosity_error

from ftkit.core.encoding import Example
from ftkit.core.generation import generate_batch, length_batches, start_of
from ftkit.core.likelihood import row_likelihoods

VOCABULARY, BATCH, LABELS = 32_000, 16, 77


class Tokenizer:
    """Ids are their own text: this measures the model."""

    bos_token_id = eos_token_id = 1

    def decode(self, ids: list[int], **_: Any) -> str:
        """Numbers, one behind the other."""
        return "".join(f" {token}" for token in ids)


def some(draw: random.Random, count: int) -> list[int]:
    """Random tokens."""
    return [draw.randrange(3, VOCABULARY) for _ in range(count)]


def make_prompts(draw: random.Random, preamble: int, count: int) -> list[list[int]]:
    """Instructions of 8 to 60 tokens behind a preamble."""
    start = some(draw, preamble)
    return [start + some(draw, draw.randint(8, 60)) for _ in range(count)]


@torch.no_grad()
def one_by_one(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """As most scripts do it."""
    return [plain(model, [prompt], new)[0] for prompt in prompts]


@torch.no_grad()
def in_padded_batches(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers with left padding, prompts in the order in which they come."""
    found = []
    for at in range(0, len(prompts), BATCH):
        found += plain(model, prompts[at : at + BATCH], new)
    return found


def plain(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """model.generate of a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "eos_token_id": 1}
    out: list[list[int]] = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    return out


def ours(model: Any, prompts: list[list[int]], new: int, *, share: bool) -> list[list[int]]:
    """eval's way: sorted by length, the common start once."""
    start = start_of(model, prompts) if share else None
    found: dict[int, list[int]] = {}
    for places in length_batches(prompts, BATCH):
        batch = [prompts[place] for place in places]
        answers = generate_batch(model, Tokenizer(), batch, stop_ids=[], max_new=new, start=start)
        found |= {place: answer.ids for place, answer in zip(places, answers, strict=True)}
    return [found[place] for place in range(len(prompts))]


@torch.no_grad()
def plain_likelihoods(model: Any, examples: list[Example]) -> list[float]:
    """One forward pass a label, all logits."""
    found = []
    for example in examples:
        ids = torch.tensor([example.ids])
        log_p = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(-float(log_p[torch.tensor(example.counted[1:])].sum()))
    return found


def compare(title: str, ways: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Each way in turn; medians, ratios to the first one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - started)
    print(title, flush=True)
    first = next(iter(ways))
    for name in ways:
        ratio = statistics.median(seconds[first]) / statistics.median(seconds[name])
        same = sum(same_result(a, b) for a, b in zip(results[name], results[first], strict=True))
        told = f"{statistics.median(seconds[name]):8.2f} s {ratio:6.2f}x   {same} of {len(results[first])} the same"
        print(f"  {name:<42}{told}", flush=True)


def same_result(one: Any, other: Any) -> bool:
    """Equal tokens, or likelihoods within what bfloat16 rounds."""
    return abs(one - other) <= 0.02 * abs(other) if isinstance(one, float) else bool(one == other)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--starts", type=int, nargs="*", default=[40, 600], help="tokens that all prompts begin with")
    asked = parser.parse_args()
    set_verbosity_error()
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, initializer_range=0.06, **shape)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    new = asked.new
    draw = random.Random(1)
    labels = [some(draw, draw.randint(3, 8)) for _ in range(LABELS)]
    examples = [
        Example(prompt + label, [False] * len(prompt) + [True] * len(label))
        for prompt in make_prompts(draw, 40, 2)
        for label in labels
    ]
    compare(
        f"the likelihood of {LABELS} labels behind each of 2 prompts",
        {
            "transformers, one by one": lambda: plain_likelihoods(model, examples),
            "ftkit, padded": lambda: [row.nats for row in row_likelihoods(model, examples, None)],
            "ftkit, packed": lambda: [row.nats for row in row_likelihoods(model, examples, None, packed=True)],
        },
        asked.rounds,
    )
    for preamble in asked.starts:
        prompts = make_prompts(random.Random(preamble), preamble, asked.prompts)
        compare(
            f"{asked.prompts} prompts behind a start of {preamble} tokens, {new} new tokens",
            {
                "transformers, one by one": lambda p=prompts: one_by_one(model, p, new),
                f"transformers, batches of {BATCH}": lambda p=prompts: in_padded_batches(model, p, new),
                f"ftkit, batches of {BATCH}, nothing shared": lambda p=prompts: ours(model, p, new, share=False),
                f"ftkit, batches of {BATCH}, start shared": lambda p=prompts: ours(model, p, new, share=True),
            },
            asked.rounds,
        )


if __name__ == "__main__":
    main()
