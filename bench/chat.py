"""chat's engine: what keeping the KV cache saves, tokens a second: python bench/chat.py MODEL [--rounds 5] [--turns 6]

The first token of each follow-up turn with the cache of the turns before, against recomputing the dialogue; tokens a
second of one answer against `model.generate`; a mixed batch of three adapters against one adapter after another; and
the time to switch adapters. The ways take turns in one run, after a round that does not count. Medians of processor
seconds are printed (run it with OMP_NUM_THREADS=1: on a shared machine the wall clock measures the neighbours), and
whether the answers are equal. Only the ratios of one run count.
MODEL: a folder, or `58m` for a Llama of 58 M random weights (bfloat16), `58m-fp32` for float32.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ftkit.core.adapter_choice import BASE, use_adapter
from ftkit.core.answering import answer_all
from ftkit.core.generation import Asked, Sampling, stream_answer
from ftkit.core.kept_cache import KeptCaches

ADAPTERS = ("one", "two", "three")


class Tokenizer:
    """Ids are their own text: this measures the model."""

    bos_token_id = eos_token_id = 1

    def decode(self, ids: list[int], **_: Any) -> str:
        """Numbers, one behind the other."""
        return "".join(f" {token}" for token in ids)


def load(name: str) -> Any:
    """The model to measure."""
    if not name.startswith("58m"):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=4096, **sizes)
    return LlamaForCausalLM(config).to(torch.float32 if name.endswith("fp32") else torch.bfloat16).eval()


def ask(model: Any, prompt: list[int], new: int, kept: KeptCaches | None, adapter: str | None = None) -> list[int]:
    """One streamed answer, as chat makes it."""
    stream = stream_answer(model, Asked(Tokenizer(), prompt, [], (), Sampling(new), None, adapter), kept)
    for _ in stream:
        pass
    return stream.answer.ids


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came out."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def follow_up(model: Any, turns: int, draw: random.Random, room: int) -> list[tuple[float, float, bool]]:
    """For each turn but the first: seconds to its first token with the kept cache and without, and whether equal."""
    tokens, answer, kept, dialogue, found = room // turns // 2, room // turns // 2 - 1, KeptCaches(), [], []
    for turn in range(turns):
        dialogue = dialogue + draw.choices(range(3, model.config.vocab_size), k=tokens)
        recomputed, alone = timed(partial(ask, model, dialogue, 1, None))
        quick, first = timed(partial(ask, model, dialogue, 1, kept))
        if turn:
            found.append((quick, recomputed, alone == first))
        dialogue = dialogue + ask(model, dialogue, answer, kept)
    return found


def against_generate(model: Any, prompt: list[int], new: int) -> tuple[float, float, bool]:
    """Seconds of one answer of `new` tokens: ours, transformers', and whether equal."""
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    ids = torch.tensor([prompt])

    def theirs() -> list[int]:
        with torch.no_grad():
            out: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
                0, len(prompt) :
            ].tolist()
        return out

    ours, answer = timed(lambda: ask(model, prompt, new, None))
    other, answer_ = timed(theirs)
    return ours, other, answer == answer_


def with_adapters(model: Any) -> Any:
    """Three adapters of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, config, ADAPTERS[0])
    for name in ADAPTERS[1:]:
        tuned.add_adapter(name, config)
    return tuned.eval()


def mixed(model: Any, prompts: list[list[int]], new: int) -> tuple[float, float, bool]:
    """Seconds for prompts of three adapters in mixed batches, adapter after adapter, and whether equal."""
    asked = [
        Asked(Tokenizer(), prompt, [], (), Sampling(new), None, ADAPTERS[number % len(ADAPTERS)])
        for number, prompt in enumerate(prompts)
    ]
    together, answers = timed(lambda: answer_all(model, asked))
    one_by_one, parts = timed(
        lambda: [answer_all(model, asked[place :: len(ADAPTERS)]) for place in range(len(ADAPTERS))]
    )
    return together, one_by_one, all(answers[place :: len(ADAPTERS)] == part for place, part in enumerate(parts))


def switch(model: Any) -> float:
    """Wall seconds to go through another adapter."""
    began = time.perf_counter()
    for name in (*ADAPTERS, BASE):
        use_adapter(model, name)
    return (time.perf_counter() - began) / (len(ADAPTERS) + 1)


def show(title: str, rounds: list[tuple[float, float, bool]], what: str, per: float = 0) -> None:
    """Medians of both ways and their ratio."""
    ours, theirs = (statistics.median(round_[way] for round_ in rounds) for way in (0, 1))
    rate = f" ({per / ours:.0f} and {per / theirs:.0f} tokens/s)" if per else ""
    same = sum(round_[2] for round_ in rounds)
    print(
        f"{title}: {1000 * ours:.1f} ms, {what} {1000 * theirs:.1f} ms{rate}, ratio {theirs / ours:.2f}x, "
        f"{same} of {len(rounds)} equal",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    model, draw, new = load(arguments.model), random.Random(1), arguments.new
    room = min(600, model.config.max_position_embeddings)
    prompt = draw.choices(range(3, model.config.vocab_size), k=40)
    prompts = [draw.choices(range(3, model.config.vocab_size), k=draw.randint(8, 60)) for _ in range(12)]
    print(
        f"{arguments.model}: {arguments.turns} turns in {room} tokens, {arguments.rounds} rounds, torch {torch.__version__}"
    )
    rounds = [
        (follow_up(model, arguments.turns, draw, room), against_generate(model, prompt, new))
        for _ in range(arguments.rounds + 1)
    ][1:]
    show("first token of a follow-up turn", [turn for turns, _ in rounds for turn in turns], "recomputed")
    show("first token of the last turn", [turns[-1] for turns, _ in rounds], "recomputed")
    show(f"one answer of {new} tokens", [one for _, one in rounds], "transformers", new)
    tuned = with_adapters(model)
    batches = [mixed(tuned, prompts, new // 2) for _ in range(arguments.rounds + 1)][1:]
    show("12 prompts of 3 adapters, mixed", batches, "adapter after adapter")
    switches = [switch(tuned) for _ in range(arguments.rounds + 1)][1:]
    print(f"to switch adapters: {1000 * statistics.median(switches):.2f} ms")


if __name__ == "__main__":
    main()
