"""Training on one CUDA card: ftkit, a plain loop of transformers and PEFT, and TRL with packing and Liger kernels.

    python bench/gpu.py [--peer trl=VENV/bin] [--size 1B --size 8B] [--method lora --method qlora] [--write docs/performance.md]

The shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, so that nothing is downloaded; LoRA r 8 on all linear
layers; rows of 2,048 tokens of which all but a short prompt are trained; no gradient checkpointing. Each program runs as
a process of its own, several rounds, interleaved; tables have medians. --size tiny --length 128 --steps 2 tries the
command itself where there is no card (its numbers mean nothing).

- tokens/s: all tokens of all steps by the program's own clock of its loop, its first steps included.
- utilisation: model FLOPs (4 a weight and token, 6 a trained weight, the head at trained tokens, attention) over the
  card's best bfloat16 product of 8192 x 8192 matrices, measured in the same run; and over what its maker promises.
- peak: what the card's driver says is in use above what it was before, four times a second.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from gpu_model import SIZES, make_model, model_flops
from train import run_measured, write_between_marks
from train_ways import trainer_seconds

HERE = Path(__file__).resolve().parent
BATCH, MICRO = 8, 2
PROMISED = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "A10": 125, "L4": 121, "T4": 65}
"""Dense bfloat16 TFLOP/s (the T4's: float16) by their makers' data sheets."""


@dataclass(frozen=True)
class Measured:
    """One run: seconds of its loop, the card's peak in GiB."""

    seconds: float
    peak: float


def main() -> None:
    """Measure what was asked for; print, and write, a table for each size and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="trl=VENV/bin", help="TRL's programs, with liger-kernel beside them")
    parser.add_argument("--size", action="append", choices=list(SIZES))
    parser.add_argument("--method", action="append", choices=["lora", "qlora"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between their marks in this file")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and asked.size != ["tiny"]:
        sys.exit("there is no CUDA card here; --size tiny --length 128 --steps 2 tries the command itself")
    peer = Path(asked.peer.split("=", 1)[1]).absolute() if asked.peer else None
    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in asked.size or ["1B", "8B"]:
            model = make_model(Path(temporary) / size, size)
            rows = write_rows(Path(temporary) / f"rows-{size}", asked.length, asked.steps * BATCH)
            for method in asked.method or ["lora", "qlora"]:
                tables.append(measure(size, method, model, rows, peer, asked))
                sys.stdout.write(tables[-1] + "\n\n")
                sys.stdout.flush()
            shutil.rmtree(model)
    if asked.write:
        write_between_marks(asked.write, "gpu", "\n\n".join(tables), "gpu.py")


def write_rows(folder: Path, length: int, count: int) -> Path:
    """Rows of words, each longer than `length` tokens: every program cuts them to the same."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(500)]
    lines = [
        json.dumps({"prompt": " ".join(draw.choices(words, k=8)) + "\n", "completion": " ".join(draw.choices(words, k=length))})
        for _ in range(count)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def measure(size: str, method: str, model: Path, rows: Path, peer: Path | None, asked: argparse.Namespace) -> str:
    """One table."""
    ways = ["ftkit", "transformers and PEFT"] + (["TRL, packing, Liger"] if peer else [])
    found: dict[str, list[Measured]] = {way: [] for way in ways}
    ceiling = 0.0
    for number in range(1, asked.rounds + 1):
        ceiling = max(ceiling, matmul_ceiling())
        for way in list(found):
            out = model.parent / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            command = command_of(way, method, model, rows, out, peer, asked)
            try:
                found[way].append(run(way, command, out))
            except (subprocess.SubprocessError, IndexError, KeyError, json.JSONDecodeError) as error:
                log = out.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
                sys.stderr.write(f"{way} failed, left out from here on: {error}\n{log[-2000:]}\n")
                del found[way]
                continue
            sys.stderr.write(f"{size} {method}, round {number}: {way}: {found[way][-1]}\n")
    return table_of(size, method, found, ceiling, asked)


def command_of(
    way: str, method: str, model: Path, rows: Path, out: Path, peer: Path | None, asked: argparse.Namespace
) -> list[str]:
    """What is typed."""
    if way == "ftkit":
        return [
            sys.executable, "-m", "ftkit", "train", str(rows / "train.jsonl"), "--model", str(model), "--run",
            str(out / "run"), f"--{method}", "--r", "8", "--alpha", "16", "--steps", str(asked.steps), "--batch",
            str(BATCH), "--micro-tokens", str(MICRO * asked.length), "--lr", "2e-4", "--schedule", "constant",
            "--warmup", "0", "--valid", "0", "--max-length", str(asked.length), "--overlength", "truncate",
            "--dtype", "bf16", "--gradient-checkpointing", "off",
        ]  # fmt: skip
    if way == "transformers and PEFT":
        script = [sys.executable, str(HERE / "gpu_plain.py"), str(model), str(rows / "train.jsonl")]
        sizes = {"steps": asked.steps, "batch": BATCH, "micro": MICRO, "length": asked.length}
        options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        return script + options + (["--qlora"] if method == "qlora" else [])
    assert peer is not None
    four = ["--load_in_4bit", "True", "--use_bnb_nested_quant", "True"] if method == "qlora" else []
    device = ["--use_liger_kernel", "True"] if torch.cuda.is_available() else ["--use_cpu", "True"]
    return [
        str(peer / "trl"), "sft", "--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir",
        str(out), "--max_steps", str(asked.steps), "--use_peft", "--lora_r", "8", "--lora_alpha", "16",
        "--lora_dropout", "0", "--lora_target_modules", "all-linear", "--learning_rate", "2e-4",
        "--lr_scheduler_type", "constant", "--per_device_train_batch_size", str(MICRO),
        "--gradient_accumulation_steps", str(BATCH // MICRO), "--gradient_checkpointing", "False", "--max_length",
        str(asked.length), "--packing", "True", "--report_to", "none",
        "--save_strategy", "no", "--logging_steps", "1", "--dtype", "bfloat16", "--bf16", "True", *device, *four,
    ]  # fmt: skip


def run(way: str, command: list[str], out: Path) -> Measured:
    """One process, watched."""
    log = out.with_suffix(".log")
    with Watch() as watch:
        run_measured(command, log, {**os.environ, "HF_HUB_OFFLINE": "1"}, out)
    text = log.read_text(encoding="utf-8", errors="replace")
    if way == "ftkit":
        seconds = float(json.loads((out / "run/run.json").read_text(encoding="utf-8"))["train_seconds"])
    elif way == "transformers and PEFT":
        seconds = float(json.loads(text.strip().splitlines()[-1])["seconds"])
    else:
        seconds = trainer_seconds(text, out)
    return Measured(seconds, watch.peak)


class Watch:
    """The most memory that the card had in use while a block ran, above what it had before, in GiB; 0 without a card."""

    def __enter__(self) -> "Watch":
        self.before, self.peak, self.over = memory_in_use(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def look(self) -> None:
        """Four times a second."""
        while not self.over.wait(0.25):
            self.peak = max(self.peak, memory_in_use() - self.before)


def memory_in_use() -> float:
    """GiB of the first card, by its driver."""
    if not torch.cuda.is_available():
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout) / 1024


def matmul_ceiling() -> float:
    """The best bfloat16 product of square matrices, in TFLOP/s."""
    device, width = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best / 1e12


def table_of(
    size: str, method: str, found: dict[str, list[Measured]], ceiling: float, asked: argparse.Namespace
) -> str:
    """Medians as Markdown."""
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no card"
    promised = next((value for name, value in PROMISED.items() if name in card), None)
    tokens = asked.steps * BATCH * asked.length
    lines = [
        f"{size}, {method}, {asked.steps} steps of {BATCH} rows of {asked.length:,} tokens, {MICRO} at once; {card},"
        f" bfloat16 products reach {ceiling:,.1f} TFLOP/s; torch {torch.__version__}; {asked.rounds} rounds,"
        f" {time.strftime('%Y-%m-%d')}.",
        "",
        "| | tokens/s | utilisation, measured ceiling | promised ceiling | peak GiB | ftkit is |",
        "|---|---|---|---|---|---|",
    ]
    for way, runs in found.items():
        seconds = median(run.seconds for run in runs)
        speed = model_flops(size, asked.length) * tokens / seconds / 1e12
        of_promised = f"{speed / promised:.0%}" if promised else ""
        ratios = [run.seconds / ours.seconds for run, ours in zip(runs, found.get("ftkit", []), strict=False)]
        ratio = f"{median(ratios):.2f}x" if ratios and way != "ftkit" else ""
        peak = median(run.peak for run in runs)
        lines.append(
            f"| {way} | {tokens / seconds:,.0f} | {speed / ceiling:.0%} | {of_promised} | {peak:.1f} | {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
