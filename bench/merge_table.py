"""The table of docs/merge.md: python bench/merge_table.py [--only lora,dora] [--write docs/merge.md]

Every cell of tests/test_merge.py's grid, merged by `ftkit merge` in a process of its own (forked from one that has the
libraries): the largest difference of a logit between base + adapter and the merged files as a share of the largest
logit (the proof's own figure), seconds with the proof, and peak memory above the libraries'. The base is
builtin:tiny, its weights cast; adapters are random, of a spread that small models notice.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT / "src")]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
from test_merge import BASES, CELLS, METHODS, as_bfloat16, make_adapter, tensors_of

from ftkit.io.base_model import BUILTIN, find_base

ROWS = {
    "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "embeddings": "LoRA on embeddings",
    "saved": "LoRA, `modules_to_save`", "tokens": "LoRA, trained tokens", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT",
    "ia3": "(IA)³", "vera": "VeRA",
}  # fmt: skip
COLUMNS = {"nf4-dq": "nf4-dq (`--qlora`)", "int8": "int8 (`--load-in-8bit`)"}
BEGIN, END = "<!-- begin: python bench/merge_table.py --write docs/merge.md -->", "<!-- end -->"
SPREAD = 0.02
ROUNDS = 3


def as_float32(base: Path, out: Path) -> Path:
    """The same model with weights in float32."""
    from safetensors.torch import save_file

    shutil.copytree(base, out, ignore=shutil.ignore_patterns("manifest.json", "ftkit.json"))
    save_file({name: t.float() for name, t in tensors_of(base).items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return out


def merge_in_child(adapter: Path, out: Path, trained_on: str | None) -> dict[str, Any]:
    """merge.json of one merge, with its seconds and its megabytes above the libraries'."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            os.write(writer, json.dumps(measured_merge(adapter, out, trained_on)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = json.loads(pipe.read() or "{}")
    os.waitpid(child, 0)
    return told | json.loads((out / "merge.json").read_text(encoding="utf-8"))


def measured_merge(adapter: Path, out: Path, trained_on: str | None) -> dict[str, float]:
    """Seconds and megabytes of one merge in this process."""
    from ftkit.cli import main

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again at what is held now
    before, started = peak_mb(), time.perf_counter()
    try:
        main(["merge", str(adapter), "-o", str(out), "-q", *(["--trained-on", trained_on] if trained_on else [])])
    except SystemExit as end:
        assert end.code == 0, end.code
    return {"seconds": time.perf_counter() - started, "mb": peak_mb() - before}


def peak_mb() -> float:
    """The largest resident size that this process had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_cell(base: str, method: str, bases: dict[str, Path], place: Path) -> str:
    """One cell of the table: medians of ROUNDS merges of one adapter."""
    quantised = base not in ("fp32", "bf16")
    folder = bases["bf16" if base == "bf16" else "fp32"]
    adapter = make_adapter(
        folder, place / "adapter", method=base if quantised else "lora", spread=SPREAD, **METHODS[method]
    )
    found = [merge_in_child(adapter, place / f"out-{n}", base if quantised else None) for n in range(ROUNDS)]
    proof = found[0]["proof"]
    assert proof["proven"]
    seconds, mb = (statistics.median(one[key] for one in found) for key in ("seconds", "mb"))
    return f"{proof['largest_difference'] / proof['largest_logit']:.0e}, {seconds:.2f} s, {mb:.0f} MB"


def table(cells: dict[tuple[str, str], str]) -> str:
    """The cells as Markdown: a row for each method, a column for each kind of base."""
    lines = ["| | " + " | ".join(COLUMNS.get(base, base) for base in BASES) + " |", "|---" * (len(BASES) + 1) + "|"]
    for method, name in ROWS.items():
        if any((base, method) in cells for base in BASES):
            lines.append(f"| {name} | " + " | ".join(cells.get((base, method), "-") for base in BASES) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all cells, print the table or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="methods, with commas")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    asked = parser.parse_args()
    wanted = asked.only.split(",") if asked.only else list(ROWS)
    import peft  # noqa: F401  # what every child needs

    import ftkit.commands.merge  # noqa: F401

    torch.set_num_threads(1)
    cells = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        plain = as_float32(Path(find_base(BUILTIN).location), root / "fp32")
        bases = {"fp32": plain, "bf16": as_bfloat16(plain, root / "bf16")}
        for number, (base, method) in enumerate(cell for cell in CELLS if cell[1] in wanted):
            place = root / f"cell-{number}"
            place.mkdir()
            cells[base, method] = measure_cell(base, method, bases, place)
            shutil.rmtree(place)
            sys.stderr.write(f"{base} {method}: {cells[base, method]}\n")
    if asked.write is None:
        sys.stdout.write(table(cells) + "\n")
        return
    page = asked.write.read_text(encoding="utf-8")
    parts = re.split(f"({re.escape(BEGIN)}\n).*?(\n{re.escape(END)})", page, flags=re.DOTALL)
    assert len(parts) == 4, f"{asked.write} has no place for the table"
    asked.write.write_text(parts[0] + parts[1] + table(cells) + parts[2] + parts[3], encoding="utf-8")


if __name__ == "__main__":
    main()
