"""The loop that a person writes with transformers and PEFT, for bench/gpu.py: rows of one length, no packing, no padding.

    python bench/gpu_plain.py MODEL ROWS.jsonl --steps 20 --batch 8 --micro 2 --length 2048 [--qlora]

Prints one line of JSON: seconds of the loop and of each step, the losses of the first and last step, the allocator's peak.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    """Load, attach LoRA, take the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    for name, default in (("steps", 20), ("batch", 8), ("micro", 2), ("length", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--qlora", action="store_true")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, labels = read_rows(asked.rows, asked.model, asked.length)
    model = load(asked.model, device, qlora=asked.qlora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4, weight_decay=0.0)
    losses, steps = [], []
    started = time.perf_counter()
    for step in range(asked.steps):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for at in range(0, asked.batch, asked.micro):
            some = [(step * asked.batch + at + i) % len(ids) for i in range(asked.micro)]
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=ids[some].to(device), labels=labels[some].to(device)).loss
            (loss * asked.micro / asked.batch).backward()
            total += loss.detach() * asked.micro / asked.batch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        losses.append(float(total))
        steps.append(time.perf_counter() - began)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    facts = {
        "seconds": seconds,
        "step_seconds": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_bytes": peak,
    }
    print(json.dumps(facts))


def read_rows(path: Path, model: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, int64 (rows, length); those of prompts are -100."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, labels = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        whole = (prompt + tokenizer(row["completion"], add_special_tokens=False).input_ids)[:length]
        ids.append(whole)
        labels.append([-100] * len(prompt) + whole[len(prompt) :])
    return torch.tensor(ids), torch.tensor(labels)


def load(folder: Path, device: str, *, qlora: bool) -> torch.nn.Module:
    """The base in bfloat16, or in NF4, with LoRA r 8 on all linear layers."""
    if qlora:
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, device_map=device)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: torch.nn.Module = get_peft_model(model, lora)
    return tuned.train()


if __name__ == "__main__":
    main()
