"""Training on one CUDA card: ftkit, a plain loop of transformers and PEFT, and TRL with packing and Liger kernels.

    python bench/gpu.py [--peer trl=VENV/bin] [--minutes 14] [-o gpu.md] [--write docs/performance.md]

The shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, so that nothing is downloaded; LoRA r 8 on all linear
layers; rows of 2,048 tokens of which all but a short prompt are trained; no gradient checkpointing.

What must be there (card, disk, libraries, the peer's programs) is looked at first. Then attention over a pack is tried by
itself, in one call and segment by segment. Then each program runs as a process of its own: every size and method once, in
the order of ORDER, and all of it again for the next round, until --rounds are done or --minutes are over. After each run
the tables are written anew to the file of -o, and the run to the same name with .jsonl: a cut-off command keeps what it has.
--size tiny --length 128 --steps 2 tries the command itself where there is no card (its numbers mean nothing).

- tokens/s: all tokens of all steps by the program's own clock of its loop, its first steps included; ftkit's counts its steps
  alone, those of the others what they do between them, too.
- steady: the same of the median step, where a program tells its steps.
- utilisation: model FLOPs (4 a weight and token, 6 a trained weight, the head at trained tokens, attention) over the
  card's best bfloat16 product of 8192 x 8192 matrices, measured in the same run; and over what its maker promises.
- peak: what the card's driver says is in use above what it was before, four times a second. foretold and measured: the
  peak of allocated tensors, as ftkit predicted it before the run and as the allocator counted it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_model import SIZES, make_model, model_flops
from train import write_between_marks
from train_ways import trainer_seconds

from ftkit.core.packing_check import Call, kernel_difference
from ftkit.core.tree_attention import Layout, segment_attention
from ftkit.core.varlen_attention import has_kernel, make_spans, varlen_attention

HERE = Path(__file__).resolve().parent
BATCH, MICRO = 8, 2
OURS, TRL = ("ftkit", "transformers and PEFT"), "TRL, packing, Liger"
GIB = 2**30
DISK = {"1B": 3 * GIB, "8B": 17 * GIB, "tiny": GIB // 8}
"""Of a model's files and a run, with some room."""
ORDER = [("tiny", "lora"), ("tiny", "qlora"), ("1B", "lora"), ("8B", "lora"), ("8B", "qlora"), ("1B", "qlora")]
"""A cheap run first, which shows whether all works, then those that there is a goal for."""
PROMISED = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "A10": 125, "L4": 121, "T4": 65}
"""Dense bfloat16 TFLOP/s (the T4's: float16) by their makers' data sheets."""
GB = 1000**3
SHORT_ROWS = Layout((40, *(60 + 7 * (at % 11) for at in range(40))), ((), *((0,) for _ in range(40))))
"""A pack of short rows behind a common start of 40 tokens, about 4,000 in all."""


@dataclass(frozen=True)
class Measured:
    """One run: seconds of its loop and of its median step, the card's peak in GiB; of tensors, foretold and measured."""

    seconds: float
    step: float | None
    peak: float
    foretold: float | None = None
    allocated: float | None = None


@dataclass
class Pairing:
    """A size and a method: what each way took, round by round, and why a way was given up."""

    size: str
    method: str
    found: dict[str, list[Measured]]
    failed: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Look at what is there, then measure in rounds, writing the tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="trl=VENV/bin", help="TRL's programs, with liger-kernel beside them")
    parser.add_argument("--size", action="append", choices=list(SIZES))
    parser.add_argument("--method", action="append", choices=["lora", "qlora"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=14, help="no run goes on beyond them")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.md"), metavar="FILE.md")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables between their marks in this file, too"
    )
    asked = parser.parse_args()
    deadline = time.monotonic() + 60 * asked.minutes
    sizes, methods = asked.size or ["1B", "8B"], asked.method or ["lora", "qlora"]
    peer = peer_of(asked)
    if problems := missing(sizes, methods, peer):
        sys.exit("\n".join(f"gpu.py: {problem}" for problem in problems))
    ways = [*OURS, *([TRL] if peer else [])]
    pairs = [(size, method) for size, method in ORDER if size in sizes and method in methods]
    pairings = [Pairing(size, method, {way: [] for way in ways}) for size, method in pairs]
    attention, ceiling = attention_table(), matmul_ceiling()

    def write() -> None:
        text = "\n\n".join([attention, *(table_of(each, ceiling, asked) for each in pairings)])
        asked.output.write_text(text + "\n", encoding="utf-8")
        if asked.write:
            write_between_marks(asked.write, "gpu", text, "gpu.py")

    write()
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(1, asked.rounds + 1):
            for pairing in pairings:
                model, rows = Path(temporary) / pairing.size, Path(temporary) / f"rows-{pairing.size}"
                if not model.exists():
                    make_model(model, pairing.size)
                    write_rows(rows, asked.length, asked.steps * BATCH)
                ceiling = max(ceiling, matmul_ceiling())
                for way in [way for way in ways if way not in pairing.failed]:
                    left = deadline - time.monotonic()
                    if left < expected_seconds(pairing, way):
                        say(f"the time is nearly over: {pairing.size} {pairing.method}, {way}: no round {number}")
                        continue
                    command = command_of(way, pairing.method, model, rows, model.parent / "out", peer, asked)
                    take(pairing, way, command, model.parent / "out", left)
                    with asked.output.with_suffix(".jsonl").open("a", encoding="utf-8") as log:
                        log.write(json.dumps({"round": number, "way": way, **last_of(pairing, way)}) + "\n")
                    write()
    sys.stdout.write(asked.output.read_text(encoding="utf-8"))


def peer_of(asked: argparse.Namespace) -> Any:
    """The folder of the peer's programs; None without."""
    return Path(asked.peer.split("=", 1)[-1]).absolute() if asked.peer else None


def missing(sizes: list[str], methods: list[str], peer: Path | None) -> list[str]:
    """What must be there and is not, each in a line; nothing is tried before all of it is."""
    problems = []
    on_card = torch.cuda.is_available()
    if not on_card and sizes != ["tiny"]:
        problems.append("there is no CUDA card here; --size tiny --length 128 --steps 2 tries the command itself")
    if on_card and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(f"{torch.cuda.get_device_name(0)} does not compute in bfloat16")
    if on_card and (used := memory_in_use()) > 2:
        problems.append(f"{used:.1f} GiB of the card are in use by something else")
    needed, free = sum(DISK[size] for size in sizes), shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        problems.append(
            f"{tempfile.gettempdir()} has {free / GB:.0f} GB free, {needed / GB:.0f} are needed; set TMPDIR"
        )
    if "qlora" in methods:
        problems += failure("bitsandbytes", try_bitsandbytes)
    if peer is not None and not (peer / "trl").exists():
        problems.append(f"{peer / 'trl'} is not there")
    elif peer is not None:
        modules = "trl, peft" + (", bitsandbytes" if "qlora" in methods else "") + (", liger_kernel" if on_card else "")
        done = subprocess.run([peer / "python", "-c", f"import {modules}"], capture_output=True, text=True)
        if done.returncode:
            problems.append(f"{peer}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return problems


@cache
def has_flash_attention(peer: Path) -> bool:
    """The peer can attend to packs without a mask: flash-attn is beside it, and a card is here."""
    done = subprocess.run([peer / "python", "-c", "import flash_attn"], capture_output=True)
    return done.returncode == 0 and torch.cuda.is_available()


def try_bitsandbytes() -> None:
    """A matrix packed into four bits on the card, and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dequantize_4bit(*quantize_4bit(torch.randn(64, 64, dtype=torch.bfloat16, device=device), quant_type="nf4"))


def failure(name: str, work: Callable[[], Any]) -> list[str]:
    """One line where `work` fails, whatever it raises."""
    try:
        work()
    except Exception as error:
        return [f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"]
    return []


def say(text: str) -> None:
    """A line on stderr, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


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


def expected_seconds(pairing: Pairing, way: str) -> float:
    """What the longest run of this kind took, with some room; of the first one nothing is known."""
    known = [asdict(run)["seconds"] for run in pairing.found[way]]
    return 1.5 * max(known) + 30 if known else 30


def take(pairing: Pairing, way: str, command: list[str], out: Path, left: float) -> None:
    """One run; where it fails, why, and it is not tried again."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        pairing.found[way].append(run(way, command, out, left))
    except subprocess.TimeoutExpired:
        pairing.failed[way] = "cut off: the time was over"
    except (subprocess.SubprocessError, IndexError, KeyError, ValueError, OSError) as error:
        log = out.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip()
        say(log[-3000:])
        pairing.failed[way] = f"failed: {(log.splitlines() or [str(error)])[-1][:150]}"
    say(f"{pairing.size} {pairing.method}: {way}: {last_of(pairing, way)}")


def last_of(pairing: Pairing, way: str) -> dict[str, Any]:
    """What the last run of a way gave."""
    facts: dict[str, Any] = {"size": pairing.size, "method": pairing.method}
    if way in pairing.failed:
        return facts | {"failed": pairing.failed[way]}
    return facts | asdict(pairing.found[way][-1])


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
    if has_flash_attention(peer):
        device += ["--attn_implementation", "flash_attention_2"]
    return [
        str(peer / "trl"), "sft", "--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir",
        str(out), "--max_steps", str(asked.steps), "--use_peft", "--lora_r", "8", "--lora_alpha", "16",
        "--lora_dropout", "0", "--lora_target_modules", "all-linear", "--learning_rate", "2e-4",
        "--lr_scheduler_type", "constant", "--per_device_train_batch_size", str(MICRO),
        "--gradient_accumulation_steps", str(BATCH // MICRO), "--gradient_checkpointing", "False", "--max_length",
        str(asked.length), "--packing", "True", "--report_to", "none",
        "--save_strategy", "no", "--logging_steps", "1", "--dtype", "bfloat16", "--bf16", "True", *device, *four,
    ]  # fmt: skip


def run(way: str, command: list[str], out: Path, left: float) -> Measured:
    """One process, watched, and ended with all that it started when `left` seconds are over."""
    log, is_ours = out.with_suffix(".log"), way in OURS
    with Watch() as watch, log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=out, start_new_session=True,
            env={name: value for name, value in os.environ.items() if is_ours or name != "PYTHONPATH"}
            | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            if process.wait(left):
                raise subprocess.CalledProcessError(process.returncode, Path(command[0]).name)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if way == "ftkit":
        info = json.loads((out / "run/run.json").read_text(encoding="utf-8"))
        lines = (out / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [line["seconds"] for line in map(json.loads, lines) if "seconds" in line]
        foretold = info.get("predicted_peak_bytes")
        on_card = torch.cuda.is_available()  # elsewhere the peak is that of the process
        return Measured(
            float(info["train_seconds"]),
            median(steps),
            watch.peak,
            foretold / GIB if foretold else None,
            info["measured_peak_bytes"] / GIB if on_card else None,
        )
    if way == "transformers and PEFT":
        facts = json.loads(text.strip().splitlines()[-1])
        allocated = facts["peak_bytes"] / GIB if facts["peak_bytes"] else None
        return Measured(float(facts["seconds"]), median(facts["step_seconds"]), watch.peak, None, allocated)
    return Measured(trainer_seconds(text, out), None, watch.peak)


class Watch:
    """The most memory that the card had in use while a block ran, above what it had before, in GiB; 0 without a card."""

    def __enter__(self) -> "Watch":
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
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
    """GiB of the card that this and other processes hold, by its driver."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def attention_table() -> str:
    """Attention over a pack of short rows, forward and backward of one layer: in one call and segment by segment."""
    if not (torch.cuda.is_available() and has_kernel()):
        return "Attention over a pack in one call: no card with FlashAttention's kernels here."
    layout = SHORT_ROWS.on("cuda")
    tokens = sum(layout.lengths)
    lines = [
        f"Attention over a pack: 40 rows behind a common start, {tokens:,} tokens, one layer, forward and backward, best of"
        f" 10; {torch.cuda.get_device_name(0)}, torch {torch.__version__}.",
        "",
        "| heads, key heads, width, window | segment by segment, ms | in one call, ms | largest relative difference |",
        "|---|---|---|---|",
    ]
    for heads, groups, width, window in ((32, 8, 64, None), (32, 8, 128, None), (16, 16, 128, None), (32, 8, 128, 100)):
        call = Call(heads, groups, width, torch.bfloat16, None, window, in_one=True)
        what = f"| {heads}, {groups}, {width}, {window or 'none'} |"
        try:
            difference = kernel_difference(call, layout, "cuda")
            loop, once = attention_milliseconds(call, layout)
            lines.append(f"{what} {loop:.2f} | {once:.2f} | {difference:.1e} |")
        except Exception as error:  # a table with a hole says more than none
            lines.append(f"{what} failed: {(str(error).splitlines() or [type(error).__name__])[0][:100]} | | |")
    say("\n".join(lines))
    return "\n".join(lines)


def attention_milliseconds(call: Call, layout: Layout) -> tuple[float, float]:
    """(segment by segment, in one call), forward and backward, by the card's own clock, best of 10."""
    tokens, spans = sum(layout.lengths), layout.spans or make_spans(layout.lengths, layout.ancestors).to("cuda")

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, call.width, dtype=call.dtype, device="cuda").requires_grad_()

    q, k, v = draw(call.heads), draw(call.groups), draw(call.groups)
    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: segment_attention(q, k, v, layout, None, 0.0, call.window, None),
        lambda: varlen_attention(q, k, v, spans, None, call.window),
    )
    best = []
    for way in ways:
        times = []
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.autograd.grad(way().sum(), (q, k, v))
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        best.append(min(times))
    return best[0], best[1]


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


def table_of(pairing: Pairing, ceiling: float, asked: argparse.Namespace) -> str:
    """Medians as Markdown, of the runs that there are so far."""
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no card"
    promised = next((value for name, value in PROMISED.items() if name in card), None)
    per_step, size = BATCH * asked.length, pairing.size
    flops = model_flops(size, asked.length) * per_step / 1e12
    rounds = max(map(len, pairing.found.values()))
    lines = [
        f"{size}, {pairing.method}, {asked.steps} steps of {BATCH} rows of {asked.length:,} tokens, {MICRO} at once; {card},"
        f" bfloat16 products reach {ceiling:,.1f} TFLOP/s; torch {torch.__version__}; medians of up to {rounds} rounds,"
        f" {time.strftime('%Y-%m-%d')}.",
        "",
        "| | runs | tokens/s | steady | utilisation, measured ceiling | promised ceiling | peak GiB | foretold | measured"
        " | ftkit is |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    if asked.peer and not has_flash_attention(peer_of(asked)):
        lines[0] += " TRL without flash-attn, so with a mask over its packs."
    for way, runs in pairing.found.items():
        if not runs:
            lines.append(f"| {way} | 0 | {pairing.failed.get(way, 'not run')} | | | | | | | |")
            continue
        seconds = median(run.seconds for run in runs) / asked.steps
        steps = [run.step for run in runs if run.step is not None]
        steady = f"{per_step / median(steps):,.0f}" if steps else ""
        of_promised = f"{flops / seconds / promised:.0%}" if promised else ""
        ratios = [run.seconds / ours.seconds for run, ours in zip(runs, pairing.found["ftkit"], strict=False)]
        ratio = f"{median(ratios):.2f}x" if ratios and way != "ftkit" else ""
        peak = f"{median(run.peak for run in runs):.1f}"
        foretold, allocated = (shown([getattr(run, name) for run in runs]) for name in ("foretold", "allocated"))
        lines.append(
            f"| {way} | {len(runs)} | {per_step / seconds:,.0f} | {steady} | {flops / seconds / ceiling:.0%} | {of_promised}"
            f" | {peak} | {foretold} | {allocated} | {ratio} |"
        )
    return "\n".join(lines)


def shown(sizes: list[float | None]) -> str:
    """The median of what is known, in GiB."""
    known = [size for size in sizes if size is not None]
    return f"{median(known):.2f}" if known else ""


if __name__ == "__main__":
    main()
