"""Every training method on small real models, one table: python bench/methods.py [--steps 20] [--write docs/methods.md]

Continued pre-training on Shakespeare, which none of the models has seen: 200 pieces of tiny_shakespeare.txt of 250
characters, 4 a step, each method at its default learning rate and targets. Then
`ftkit eval --forgetting` on 20 pieces of the dialogues in tinychat_val.txt, the kind of text that the models come from.
Seconds are of the steps, by the processor's clock where nothing else runs (OMP_NUM_THREADS=1); the peak is that of the
process, libraries included. Rows are held out by content, so all methods are measured on the same ones.

Needs ../shared beside the checkout, or --shared. Methods that a model has no place for are told with the reason.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from csv import DictReader
from io import BytesIO, TextIOWrapper
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ftkit.commands.eval
import ftkit.commands.train  # loaded once, before processes are forked

CHECKOUT = Path(__file__).parents[1]
MODELS = ("stories260k", "tinystories-chat-3m")
QUANTISED = {"none": "", "nf4, dq": "--quantize nf4", "int8": "--quantize int8"}
WAYS = {
    "LoRA": "--lora",
    "LoRA, attention only": "--targets attention",
    "rsLoRA": "--rslora",
    "LoRA+ (16)": "--lora-plus 16",
    "PiSSA": "--lora-init pissa",
    "DoRA": "--dora",
    "IA3": "--method ia3",
    "norms": "--method ln",
    "BitFit": "--method bitfit",
    "last two blocks": "--train-layers last:2",
    "all but embeddings": "--freeze embed|wte|wpe",
    "full": "--full",
    "prompt, 20": "--method prompt",
    "prefix, 20": "--method prefix",
}
ON_QUANTISED = ("LoRA", "DoRA", "IA3", "prompt, 20")
PIECE, TRAIN, GENERAL = 250, 200, 20


def main() -> None:
    """Print the tables, or write them between their marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=CHECKOUT.parent / "shared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows, general = make_rows(asked.shared / "data", work)
        folders = [asked.shared / "models" / model for model in MODELS]
        lines = [line for folder in folders for line in lines_of(folder, rows, general, asked.steps, work)]
    head = "| model | base | method | trained | share | seconds | peak MB | held-out loss | general text |"
    table = "\n".join([told(asked.steps), "", head, "|" + "---|" * 9, *lines])
    published = "\n".join(published_lines())
    if asked.write is None:
        sys.stdout.write(table + "\n\n" + published + "\n")
        return
    write_between_marks(asked.write, "measured", table)
    write_between_marks(asked.write, "published", published)


def make_rows(data: Path, work: Path) -> tuple[Path, Path]:
    """(rows to learn, rows of general text) as files."""
    shakespeare = (data / "text" / "tiny_shakespeare.txt").read_text(encoding="utf-8")
    dialogues = (data / "chat" / "tinychat_val.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
    paths = work / "shakespeare.jsonl", work / "general.jsonl"
    for path, text, count in zip(paths, (shakespeare, dialogues), (TRAIN, GENERAL), strict=True):
        pieces = [text[at : at + PIECE] for at in range(0, count * PIECE, PIECE)]
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    return paths


def lines_of(model: Path, rows: Path, general: Path, steps: int, work: Path) -> Iterator[str]:
    """A line for each method on each kind of base."""
    for base, bits in QUANTISED.items():
        for name, options in WAYS.items():
            if bits and name not in ON_QUANTISED:
                continue
            run = work / re.sub(r"\W+", "-", f"{model.name} {base} {name}")
            command = ["train", str(rows), "--model", str(model), "--run", str(run), "--steps", str(steps), "--batch", "4",
                       "--max-length", "128", "--overlength", "truncate", "--json", *options.split(), *bits.split()]  # fmt: skip
            sys.stderr.write(f"{model.name}, {base}: {name}\n")
            info, fault = ftkit(command)
            cells = [model.name, base, name]
            if info is None:
                yield "| " + " | ".join([*cells, f"refused: {fault}", *[""] * 5]) + " |"
                continue
            scores, _ = ftkit(["eval", "--run", str(run), "--metrics", "loss", "--forgetting", str(general), "--json",
                               "-o", str(work / "p.jsonl"), "--force"])  # fmt: skip
            assert scores is not None
            yield "| " + " | ".join([*cells, *numbers(info, scores)]) + " |"


def numbers(info: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    """The measured cells of a line."""
    forgotten = scores["forgetting"]
    return [
        f"{info['trainable']:,}",
        f"{info['trainable'] / info['parameters']:.2%}",
        f"{info['train_seconds']:.1f}",
        f"{info['measured_peak_bytes'] / 1e6:,.0f}",
        f"{info['valid_loss_before']:.3f} -> {info['valid_loss']:.3f}",
        f"{forgotten['before']:.3f} {forgotten['rise']:+.3f}",
    ]


def ftkit(arguments: list[str]) -> tuple[dict[str, Any] | None, str]:
    """(what a command prints as JSON, ""), or (None, the reason of its refusal): in a process forked from this one."""
    with get_context("fork").Pool(1) as pool:
        status, out, err = pool.apply(run_command, (arguments,))
    if status == 0:
        return json.loads(out), ""
    (reason,) = [line for line in err.splitlines() if line.startswith("ftkit: error: ")]
    return None, reason.removeprefix("ftkit: error: ").removeprefix("--method bitfit: ").removeprefix(
        "--dora on an 8-bit base: "
    )


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `ftkit ...`, the libraries loaded already."""
    from ftkit.cli import main

    out, err, sys.stdin = (TextIOWrapper(BytesIO(), encoding="utf-8") for _ in range(3))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            written = [stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush()]  # type: ignore[attr-defined]
            return int(ended.code or 0), *written
    raise AssertionError("main always leaves by SystemExit")


def told(steps: int) -> str:
    """What was run."""
    import torch
    from peft import __version__ as peft
    from transformers import __version__ as transformers

    return f"{steps} steps of 4 pieces; torch {torch.__version__}, transformers {transformers}, peft {peft}."


def published_lines() -> Iterator[str]:
    """PEFT's own comparison, as far as tests/published/measured.csv has it."""
    with (CHECKOUT / "tests" / "published" / "measured.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in DictReader(file) if "MetaMathQA" in row["source"]]
    yield "| method | rank | layers | trained | peak GiB | file |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: float(row["measured_gib"])):
        trained = re.search(r"trainable=(\d+)", row["notes"])
        count = f"{int(trained[1]):,}" if trained else ""
        layers = row["targets"].replace(";", ", ")
        peak, file = float(row["measured_gib"]), row["source"].rpartition("/")[2]
        yield f"| {row['method']} | {row['rank']} | {layers} | {count} | {peak:.2f} | `{file}` |"


def write_between_marks(path: Path, name: str, table: str) -> None:
    """Replace what stands between <!-- methods.py NAME --> and <!-- end -->."""
    text = path.read_text(encoding="utf-8")
    mark, end = f"<!-- methods.py {name} -->\n", "<!-- end -->"
    before, _, rest = text.partition(mark)
    if not rest:
        sys.exit(f"{path} has no line {mark.strip()}")
    path.write_text(before + mark + table + "\n" + end + rest.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
