"""The ways of bench/train.py: each program's published command for a job, and where it writes the time of its loop.

The recipe: LoRA r 8, alpha 16, no dropout on every linear layer of the blocks; AdamW 2e-4, constant, no weight decay;
BATCH rows a step in micro-batches of 4; no gradient checkpointing; loss on the completion only; bfloat16 products.
What a recipe leaves open keeps each program's default.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from train_jobs import BATCH, Job, write_json

RANK, ALPHA, RATE, MICRO = 8, 16, 2e-4, 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIT_CHECKPOINT = "litgpt-checkpoint"


@dataclass(frozen=True)
class Way:
    """One program with its options.

    command: (job, folder for its output, seed) -> what to run, after the folder of the peer's programs.
    loop_seconds: (log, folder) -> seconds of the training loop, by the program's own clock.
    adapter: where in the folder the trained adapter lies.
    peer: the environment that it needs; None for ftkit.
    """

    name: str
    peer: str | None
    command: Callable[[Job, Path, int], list[str]]
    loop_seconds: Callable[[str, Path], float]
    adapter: str
    same_training: bool = True


def ftkit_command(job: Job, out: Path, seed: int) -> list[str]:
    """`ftkit train` as it is, without rows held out."""
    return [
        sys.executable, "-m", "ftkit", "train", str(job.folder / "rows/train.jsonl"), "--model", str(job.model),
        "--run", str(out / "run"), "--steps", str(job.steps), "--batch", str(BATCH), "--r", str(RANK),
        "--alpha", str(ALPHA), "--lr", str(RATE), "--schedule", "constant", "--warmup", "0",
        "--max-length", str(job.max_length), "--valid", "0", "--seed", str(seed),
    ]  # fmt: skip


def trl_command(job: Job, out: Path, seed: int, *more: str, micro: int = MICRO) -> list[str]:
    """`trl sft` of rows with prompt and completion; bf16 autocast, its default."""
    return [
        "trl", "sft", "--model_name_or_path", str(job.model), "--dataset_name", str(job.folder / "rows"),
        "--output_dir", str(out), "--use_cpu", "True", "--seed", str(seed), "--num_train_epochs", str(job.epochs),
        "--use_peft", "--lora_r", str(RANK), "--lora_alpha", str(ALPHA), "--lora_dropout", "0",
        "--lora_target_modules", *LINEAR, "--learning_rate", str(RATE), "--lr_scheduler_type", "constant",
        "--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(BATCH // micro),
        "--gradient_checkpointing", "False", "--max_length", str(job.max_length), "--report_to", "none",
        "--save_strategy", "no", "--logging_steps", "1", "--dtype", "float32", "--bf16", "True", *more,
    ]  # fmt: skip


def trl_packed_command(job: Job, out: Path, seed: int) -> list[str]:
    """The same with `--packing True`: a row is then a pack of up to max_length tokens, so there are fewer steps."""
    return trl_command(job, out, seed, "--packing", "True", micro=1)


def llamafactory_command(job: Job, out: Path, seed: int) -> list[str]:
    """`llamafactory-cli train FILE.yaml`; bf16 autocast (pure_bf16 is refused on a CPU)."""
    settings = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(job.model), "trust_remote_code": False,
        "dataset": "rows", "dataset_dir": str(job.folder / "llamafactory"), "template": "empty",
        "cutoff_len": job.max_length, "overwrite_cache": True, "finetuning_type": "lora", "lora_rank": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_target": "all", "output_dir": str(out / "adapter"),
        "overwrite_output_dir": True, "logging_steps": 1, "save_strategy": "no", "plot_loss": False,
        "report_to": "none", "per_device_train_batch_size": MICRO, "gradient_accumulation_steps": BATCH // MICRO,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "num_train_epochs": job.epochs, "bf16": True,
        "disable_gradient_checkpointing": True, "use_cpu": True, "seed": seed,
    }  # fmt: skip
    return ["llamafactory-cli", "train", str(write_json(out / "settings.yaml", settings))]


def litgpt_command(job: Job, out: Path, seed: int) -> list[str]:
    """`litgpt finetune_lora` of a converted checkpoint; bf16-mixed.

    It has no constant rate: its first step is warm-up (without one it divides by zero), then its rate falls as a cosine.
    """
    style = {"class_path": "litgpt.prompts.Default"}  # the prompt as it is
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": RATE, "weight_decay": 0.0}}
    return [
        "litgpt", "finetune_lora", str(job.folder.parent / LIT_CHECKPOINT), "--out_dir", str(out),
        "--precision", "bf16-mixed", "--data", "JSON", "--data.json_path", str(job.folder / "litgpt"),
        "--data.prompt_style", json.dumps(style), "--data.mask_prompt", "true", "--data.num_workers", "0",
        "--train.global_batch_size", str(BATCH), "--train.micro_batch_size", str(MICRO),
        "--train.epochs", str(ceil(job.epochs)), "--train.max_steps", str(job.steps),
        "--train.max_seq_length", str(job.max_length), "--train.lr_warmup_steps", "1",
        "--train.save_interval", "100000", "--eval.interval", "100000", "--eval.initial_validation", "false",
        "--eval.final_validation", "false", "--lora_r", str(RANK), "--lora_alpha", str(ALPHA), "--lora_dropout", "0",
        "--lora_query", "true", "--lora_key", "true", "--lora_value", "true", "--lora_projection", "true",
        "--lora_mlp", "true", "--optimizer", json.dumps(optimizer), "--seed", str(seed),
    ]  # fmt: skip


def ftkit_seconds(_: str, out: Path) -> float:
    """Of all steps, as run.json has them."""
    return float(json.loads((out / "run/run.json").read_text(encoding="utf-8"))["train_seconds"])


def trainer_seconds(log: str, _: Path) -> float:
    """transformers' Trainer: train_runtime, in seconds or as H:MM:SS."""
    found = re.findall(r"'?train_runtime'?\s*[:=]\s*'?([0-9.:e+]+)", log)[-1]
    return sum(float(part) * 60**power for power, part in enumerate(reversed(found.split(":"))))


def litgpt_seconds(log: str, _: Path) -> float:
    """LitGPT's "Training Time"."""
    return float(re.findall(r"training time\s*[:|]\s*([0-9.]+)", log, re.IGNORECASE)[-1])


WAYS = (
    Way("ftkit", None, ftkit_command, ftkit_seconds, "run/adapter"),
    Way("TRL", "trl", trl_command, trainer_seconds, "."),
    Way("TRL, packing", "trl", trl_packed_command, trainer_seconds, ".", same_training=False),
    Way("LLaMA-Factory", "llamafactory", llamafactory_command, trainer_seconds, "adapter"),
    Way("LitGPT", "litgpt", litgpt_command, litgpt_seconds, "final"),
)


def environment(way: Way, programs: Path | None, out: Path, threads: int) -> dict[str, str]:
    """What a way runs in: no network, no GPU, nothing cached from before, no module of ours in a peer's path."""
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads),
           "TOKENIZERS_PARALLELISM": "true", "PYTHONWARNINGS": "ignore"}  # fmt: skip
    if way.peer is None:
        return {**os.environ, **own}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, **own, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "WANDB_DISABLED": "true"}
