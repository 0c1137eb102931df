"""One optimizer step on the same rows, padded, packed and with shared starts: python bench/train_step.py [--rounds 5]

A Llama of 58 M random weights (bfloat16) with LoRA r 8 on all linear layers, AdamW, 16 rows a step. Rows have the lengths
of an alpaca set (a preamble of 40 tokens), or stand behind a system prompt of 600. Every way takes the same step in turn;
medians of seconds, tokens of the rows per second and the ratio to padded rows with PEFT's own forward pass are printed,
and the loss, which is the same for all. Only the ratios of one run count: machines and moments differ.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import set_verbosity_error

from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import auto_micro_batch, micro_batches, packed_batches
from ftkit.core.encoding import Example
from ftkit.core.loss import summed_loss
from ftkit.core.optimizers import make_optimizer
from ftkit.core.packed_attention import packed_attention
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import train_step

VOCABULARY, BUDGET = 32_000, 4096
WAYS = {  # name: (packed, shared, our LoRA forward)
    "padded, PEFT's forward": (False, False, False),
    "padded": (False, False, True),
    "packed": (True, False, True),
    "packed, shared, PEFT's forward": (True, True, False),
    "packed, shared": (True, True, True),
}


def alpaca_rows(draw: random.Random) -> list[Example]:
    """A preamble of 40 tokens (one of two, as with and without an input), an instruction and an answer."""
    preambles = [some(draw, 40), some(draw, 46)]
    return [example(draw.choice(preambles) + some(draw, draw.randint(8, 60)), draw, 20, 160) for _ in range(16)]


def system_rows(draw: random.Random) -> list[Example]:
    """A system prompt of 600 tokens, then a question and an answer."""
    system = some(draw, 600)
    return [example(system + some(draw, draw.randint(20, 60)), draw, 80, 220) for _ in range(16)]


def example(prompt: list[int], draw: random.Random, shortest: int, longest: int) -> Example:
    """A prompt with an answer of its own."""
    answer = some(draw, draw.randint(shortest, longest))
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def some(draw: random.Random, count: int) -> list[int]:
    """Random tokens."""
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def build_model(key_value_heads: int) -> torch.nn.Module:
    """The frozen model with a new adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=key_value_heads)  # fmt: skip
    return make_trainable(LlamaForCausalLM(config).to(torch.bfloat16), TrainSettings(r=8, alpha=16.0)).train()


def use_peft_forward(model: torch.nn.Module, own: bool) -> None:
    """Take our forward pass of LoRA layers away, or put it back."""
    from ftkit.core.lora_forward import speed_up_lora

    for module in model.modules():
        module.__dict__.pop("forward", None) if hasattr(module, "lora_A") else None
    if own:
        speed_up_lora(model)


def take_step(
    model: torch.nn.Module,
    optimizer: Any,
    rows: list[Example],
    way: tuple[bool, bool, bool],
    clock: Callable[[], float],
) -> tuple[float, float]:
    """(seconds of one step, cutting the rows into batches included; its loss)."""
    packed, shared, own = way
    use_peft_forward(model, own)
    before = [p.detach().clone() for p in trainable_parameters(model)]
    rows_at_once = auto_micro_batch(max(len(row.ids) for row in rows), len(rows))
    started = clock()
    with packed_attention(model) if packed else nullcontext():
        batches = packed_batches(rows, BUDGET, share=shared) if packed else micro_batches(rows, rows_at_once)
        loss, _ = train_step(model, optimizer, batches, summed_loss, torch.amp.GradScaler("cpu", enabled=False), 1.0)
    seconds = clock() - started
    with torch.no_grad():
        for parameter, old in zip(trainable_parameters(model), before, strict=True):
            parameter.copy_(old)  # every way starts from the same weights
    return seconds, loss


def main() -> None:
    """Print a table for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--cpu-seconds", action="store_true", help="with one thread: what else runs matters less")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    model = build_model(arguments.key_value_heads)
    optimizer = make_optimizer(model, "adamw", 2e-4, 0.0)
    for name, make_rows in (("alpaca", alpaca_rows), ("600-token system prompt", system_rows)):
        rows = make_rows(random.Random(3))
        tokens = sum(len(row.ids) for row in rows)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        losses: dict[str, float] = {}
        for turn in range(arguments.rounds + 1):  # the first turn warms up
            for way, kind in WAYS.items():
                seconds, losses[way] = take_step(model, optimizer, rows, kind, clock)
                times[way] += [seconds] if turn else []
        print(
            f"\n| {name}: {len(rows)} rows, {tokens:,} tokens | s/step | tokens/s | ratio | loss |\n|---|---|---|---|---|"
        )
        usual = times["padded, PEFT's forward"]
        for way, seconds_each in times.items():
            ratio = statistics.median(a / b for a, b in zip(usual, seconds_each, strict=True))
            middle = statistics.median(seconds_each)
            print(f"| {way} | {middle:.2f} | {tokens / middle:,.0f} | {ratio:.2f} | {losses[way]:.4f} |")


if __name__ == "__main__":
    main()
