"""Measure the memory of real training steps over a grid: python bench/measure_memory.py [--small] [-o FILE.csv]

One command for a machine with a CUDA GPU: every line of GRID is run in a process of its own as
`ftkit estimate-memory --measure --json`, with random weights of the model's sizes, so that nothing is downloaded. Cheap
runs come first, each is in the file as soon as it is over, and none goes on beyond --minutes. Every line says what was
predicted, what was measured and how far they are apart.

The file has the columns of tests/published/measured.csv: `python bench/score_memory.py FILE.csv` scores it anywhere, without
a GPU. What the card is too small for is said and left out. Without a GPU, --small runs models of half a gigabyte on the
CPU, where the growth of the process is measured. `notes` holds the options of each run, as they were typed; rows that
share prompts are those of shared_rows.py. What is in use on the card outside of PyTorch's pool is a row of its own, which is not
scored: it is what core/gpus.py assumes of the CUDA context.
"""

import argparse
import csv
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import IO, Any

import torch
from shared_rows import NAME as SHARED
from shared_rows import write_shared_rows

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
COLUMNS = (
    *("model", "method", "quant", "rank", "targets", "seq_len", "micro_batch", "grad_ckpt", "optimizer", "dtype"),
    *("attention", "n_gpus", "strategy", "measured_gib", "gpu", "source", "metric", "framework", "versions"),
    *("quality", "notes"),
)
MODELS = ("HuggingFaceTB/SmolLM2-1.7B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B")
OPTIONS = (
    "--lora --gradient-checkpointing on",
    "--lora --gradient-checkpointing off --micro-batch 1",
    "--qlora --gradient-checkpointing on",
    "--qlora --gradient-checkpointing on --max-length 4096",
    "--qlora --gradient-checkpointing off --micro-batch 1 --targets q_proj,v_proj --r 64",
    "--load-in-8bit --gradient-checkpointing on",
    "--lora --gradient-checkpointing on --pack off --micro-batch 4 --dropout 0.05",
    "--full --dtype bf16 --gradient-checkpointing on --optimizer adamw-8bit",
    "--full --dtype bf16 --gradient-checkpointing on --optimizer paged-adamw-8bit",
)
GRID = [
    ("HuggingFaceTB/SmolLM2-135M", "--lora --dtype fp32 --gradient-checkpointing off"),
    ("HuggingFaceTB/SmolLM2-360M", "--full --dtype bf16 --gradient-checkpointing off --optimizer sgd"),
    ("Qwen/Qwen2.5-1.5B-Instruct", "--qlora --gradient-checkpointing on --micro-batch 8 --max-length 1024"),
    *((MODELS[0], options) for options in OPTIONS),
    (MODELS[0], f"--lora --gradient-checkpointing off --batch 32 --data {SHARED}"),
    (MODELS[0], "--full --gradient-checkpointing on"),
    (MODELS[0], "--full --gradient-checkpointing off --micro-batch 1 --batch 1"),
    *((model, options) for model in MODELS[1:] for options in OPTIONS),
]
"""Cheap runs first."""
SMALL = [
    ("HuggingFaceTB/SmolLM2-135M", f"{options} --max-length 256 --batch 4 --micro-batch 2 --dtype {dtype}")
    for dtype in ("bf16", "fp32")
    for options in (
        "--lora --gradient-checkpointing off",
        "--lora --gradient-checkpointing on",
        "--qlora --gradient-checkpointing on",
        "--load-in-8bit --gradient-checkpointing off",
        "--full --gradient-checkpointing on",
        "--full --gradient-checkpointing off --optimizer adamw-8bit --pack off",
    )
]
SMALL.append(
    (SMALL[0][0], f"--lora --gradient-checkpointing off --dtype fp32 --batch 32 --micro-tokens 1024 --data {SHARED}")
)
SHORTEST = 15.0
"""Seconds within which no run ends."""
METRICS = {
    "allocated_bytes": "max_memory_allocated",
    "reserved_bytes": "max_memory_reserved",
    "resident_bytes": "growth of resident memory",
    "outside_bytes": "outside of the pool",
}


def measure(folder: Path, options: str, seconds: float) -> dict[str, Any] | None:
    """One run in a process of its own; None where it is too large, fails, or takes longer than `seconds`, which is said."""
    command = [sys.executable, "-m", "ftkit", "estimate-memory", "--measure", "--json", "-q", "--model", str(folder)]
    try:
        done = subprocess.run(
            [*command, *shlex.split(options)], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds,
            cwd=folder,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        say(f"{folder.name} {options}: cut off, the time is over")
        return None
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["?"])[0]
        say(f"{folder.name} {options}: left out (exit {done.returncode}): {why}")
        return None
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def say(text: str) -> None:
    """A line on stderr, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def told(model: str, options: str, report: dict[str, Any]) -> str:
    """What was predicted and measured, in GiB, and the error of the prediction."""
    found = []
    for key, metric in METRICS.items():
        if measured := report["measured"].get(key):
            predicted = report["predicted"].get("allocated_bytes" if key == "resident_bytes" else key)
            beside = predicted and f", predicted {predicted / 2**30:.3f} ({predicted / measured - 1:+.1%})"
            found.append(f"{metric} {measured / 2**30:.3f} GiB{beside or ''}")
    return f"{model} {options}: {'; '.join(found)}"


def rows_of(model: str, options: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each number that was measured."""
    run, data = report["run"], report["data"]
    rows, length = (1, f"{data['heaviest']} shared") if data else (run["rows"], run["tokens"])
    shared = {
        "model": model,
        "method": run["method"],
        "quant": {"qlora": "nf4-dq", "int8": "int8"}.get(run["method"], "none"),
        "seq_len": f"{length} {'packed' if run['pack'] else 'padded'}",
        "micro_batch": rows,
        "grad_ckpt": "yes" if run["checkpointing"] else "no",
        "optimizer": run["optimizer"],
        "dtype": run["dtype"],
        "attention": "ftkit",
        "n_gpus": 1,
        "strategy": "single",
        "gpu": report["device"],
        "source": f"bench/measure_memory.py, {date.today()}",
        "framework": "ftkit",
        "versions": "; ".join([f"python {platform.python_version()}", *map(" ".join, report["versions"].items())]),
        "quality": "A",
        "notes": options,
    }
    return [
        shared | {"metric": metric, "measured_gib": f"{report['measured'][key] / 2**30:.4f}"}
        for key, metric in METRICS.items()
        if report["measured"].get(key)
    ]


def write_rows(file: IO[str], rows: list[dict[str, Any]]) -> None:
    """Append rows; the names of the columns first, where the file is empty."""
    writer = csv.DictWriter(file, COLUMNS)
    if file.tell() == 0:
        writer.writeheader()
    writer.writerows(rows)


def main() -> None:
    """Run the grid and write the file, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="models of half a gigabyte, for a CPU")
    parser.add_argument("-o", "--output", type=Path, default=Path("measured.csv"), metavar="FILE.csv")
    parser.add_argument("--minutes", type=float, default=14, help="no run goes on beyond them")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if not (arguments.small or torch.cuda.is_available()):
        sys.exit("measure_memory.py: there is no CUDA card here; --small measures what a CPU can")
    configs = json.loads((PUBLISHED / "configs.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch, arguments.output.open("w", newline="", encoding="utf-8") as file:
        write_rows(file, [])
        for model, options in SMALL if arguments.small else GRID:
            folder = Path(scratch) / model.split("/")[-1]
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(configs[model]), encoding="utf-8")
            if SHARED in options:
                write_shared_rows(folder)
            left = deadline - time.monotonic()
            if left < SHORTEST:
                say(f"{model} {options}: not run, the time is nearly over")
                continue
            report = measure(folder, options, left)
            if report is not None:
                write_rows(file, rows_of(model, options, report))
                file.flush()
                say(told(model, options, report))


if __name__ == "__main__":
    main()
