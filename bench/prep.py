"""prep against the usual ways, the same rows out: python bench/prep.py [--rows 100000] [--rounds 3]

`--memory 100000,1000000,5000000` instead measures the peak memory of tables of these sizes, with de-duplication and
without, and the bytes a row that it costs. `--scaling` measures `--jobs 2` against one job and against what the machine can do:
two preps of one job at once, each over half of the rows; plain rows first, then --work with fewer rows. `--first-row` measures
the time from the start of the program to its first row.

A CSV of products becomes alpaca rows (prompt and completion by template, rows without a description left out, equal
rows once). Every way runs in a process of its own, interleaved; medians, peak memory and ratios are printed. Only the
ratios of one run count: machines and moments differ.
"""

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

QUESTION = "Create a description for the following product: {product}, belonging to category: {category}"
WORDS = [
    "the",
    "a",
    "with",
    "for",
    "easy",
    "to",
    "use",
    "and",
    "made",
    "of",
    "steel",
    "cotton",
    "bamboo",
    "that",
    "keeps",
    "your",
    "day",
    "simple",
    "bright",
    "quiet",
    "warm",
    "dry",
    "safe",
    "long",
    "lasting",
    "gift",
]


def make_table(path: Path, rows: int) -> None:
    """A CSV of products: quotes, line ends in quotes, empty descriptions, a few equal rows; from a seed."""
    draw = random.Random(7)
    adjectives = [
        "compact",
        "durable",
        "elegant",
        "lightweight",
        "wireless",
        "ergonomic",
        "vintage",
        "premium",
        "recycled",
        "café-style",
    ]
    nouns = [
        "lamp",
        "backpack",
        "kettle",
        "keyboard",
        "chair",
        "bottle",
        "jacket",
        "speaker",
        "notebook",
        "drill",
        "mat",
        "clock",
    ]
    categories = ["Home & Kitchen", "Electronics", "Office", "Outdoors", 'Tools, "Pro"', "Clothing"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["product", "category", "description"])
        row = ["", "", ""]
        for number in range(rows):
            text = "" if number % 97 == 0 else " ".join(draw.choices(WORDS, k=draw.randint(12, 40))).capitalize() + "."
            text = text.replace(" and ", ',\n"and" ') if number % 11 == 0 else text
            name = f"{draw.choice(adjectives)} {draw.choice(nouns)} {number}"
            row = row if number % 50 == 49 and row[2] else [name, draw.choice(categories), text]
            writer.writerow(row)


def prompt_of(product: str, category: str) -> str:
    """Stanford Alpaca's prompt without an input."""
    question = QUESTION.format(product=product, category=category)
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{question}\n\n### Response:"
    )


def with_pandas(source: str, out: str) -> None:
    """pandas: read_csv, dropna, apply, drop_duplicates."""
    import pandas

    table = pandas.read_csv(source, keep_default_na=False)
    table = table[table["description"].str.strip() != ""]
    rows = table.apply(
        lambda r: {"prompt": prompt_of(r["product"], r["category"]), "completion": r["description"]}, axis=1
    )
    made = pandas.DataFrame(rows.tolist()).drop_duplicates()
    with open(out, "w", encoding="utf-8") as file:
        for row in made.to_dict("records"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def with_datasets(source: str, out: str) -> None:
    """datasets: load_dataset, filter, map, to_json."""
    import datasets

    datasets.disable_progress_bars()
    seen: set[tuple[str, str]] = set()

    def is_wanted(row: dict[str, str]) -> bool:
        key = (prompt_of(row["product"], row["category"]), row["description"])
        is_new = bool(row["description"] and row["description"].strip()) and key not in seen
        seen.add(key)
        return is_new

    def render(row: dict[str, str]) -> dict[str, str]:
        return {"prompt": prompt_of(row["product"], row["category"]), "completion": row["description"]}

    with tempfile.TemporaryDirectory() as folder:
        data = datasets.load_dataset("csv", data_files=source, split="train", cache_dir=folder)
        data = data.filter(is_wanted)
        data.map(render, remove_columns=data.column_names).to_json(out, force_ascii=False)


def with_ftkit(source: str, out: str, *more: str) -> None:
    """ftkit prep."""
    from ftkit.cli import main

    maps = ["--map", f"instruction={QUESTION}", "--map", "output=description"]
    try:
        main(["prep", source, "--template", "alpaca", *maps, "-o", out, "--force", "-q", *more])
    except SystemExit as end:
        assert end.code == 0
    for process in multiprocessing.active_children():  # those of --jobs: their time counts once they have ended
        process.join()


WAYS: dict[str, Callable[..., None]] = {
    "pandas": with_pandas,
    "datasets": with_datasets,
    "ftkit": with_ftkit,
    "ftkit --dedupe none": lambda source, out, *more: with_ftkit(source, out, "--dedupe", "none", *more),
    "ftkit --jobs 2": lambda source, out, *more: with_ftkit(source, out, "--jobs", "2", *more),
}
"""Ways to make the rows; ftkit's take more options."""


def fingerprint(path: Path) -> tuple[int, str]:
    """(rows, sha256 of all prompts and completions in order)."""
    digest, rows = hashlib.sha256(), 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            rows, row = rows + 1, json.loads(line)
            digest.update(repr((row["prompt"], row["completion"])).encode())
    return rows, digest.hexdigest()[:12]


def start(way: str, source: Path, out: Path, more: str = "") -> "subprocess.Popen[bytes]":
    """One way in a process of its own; `more`: options of ftkit behind its own."""
    command = [sys.executable, __file__, "--way", way, "--source", str(source), "--out", str(out), f"--more={more}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def end_of(process: "subprocess.Popen[bytes]") -> bytes:
    """What it has printed, once it has ended well."""
    written, said = process.communicate()
    assert process.returncode == 0, said.decode()
    return written


def measure(way: str, source: Path, out: Path, more: str = "") -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MB) of one way, its start included."""
    started = time.perf_counter()
    cpu, peak = map(float, end_of(start(way, source, out, more)).split()[-2:])
    return time.perf_counter() - started, cpu, peak


AUGMENT = """def rows(row):
    words = row["description"].split()
    return [row, {**row, "description": " ".join(sorted(words * 50, key=lambda word: (len(word), word))[::50])}]
"""
WORK = {
    "rows": "",
    "--tokenizer": "--tokenizer builtin:tiny --max-tokens 512",
    "--dedupe near": "--dedupe near",
    "--augment": "--augment FOLDER/augment.py:rows",
}
"""What is asked of prep, and how `--scaling` calls it."""


def measure_scaling(sizes: dict[str, int], rounds: int, folder: Path) -> None:
    """Print one job, two jobs, and two preps at once over half of the rows each, for each kind of work."""
    (folder / "augment.py").write_text(AUGMENT, encoding="utf-8")
    whole, halves, outs = folder / "all.csv", [folder / "a.csv", folder / "b.csv"], [folder / "a.out", folder / "b.out"]
    sys.stdout.write(f"{'work':<15}{'rows':>10}{'1 job s':>9}{'CPU':>7}{'2 jobs s':>9}{'CPU':>7}{'ratio':>7}")
    sys.stdout.write(f"{'halves s':>9}{'ratio':>7}{'share':>7}\n")
    for work, rows in sizes.items():
        more = WORK[work].replace("FOLDER", str(folder))
        make_table(whole, rows)
        for half in halves:
            make_table(half, rows // 2)
        found: list[tuple[float, ...]] = []
        for _ in range(rounds):
            one = measure("ftkit", whole, outs[0], more)
            two = measure("ftkit --jobs 2", whole, outs[1], more)
            assert outs[0].read_bytes() == outs[1].read_bytes()
            started = time.perf_counter()
            both = [start("ftkit", half, out, more) for half, out in zip(halves, outs, strict=True)]
            for process in both:
                end_of(process)
            found.append((*one[:2], *two[:2], time.perf_counter() - started))
        one_s, one_cpu, two_s, two_cpu, halves_s = (statistics.median(column) for column in zip(*found, strict=True))
        sys.stdout.write(f"{work:<15}{rows:>10,}{one_s:>9.2f}{one_cpu:>7.2f}{two_s:>9.2f}{two_cpu:>7.2f}")
        sys.stdout.write(f"{one_s / two_s:>7.2f}{halves_s:>9.2f}{one_s / halves_s:>7.2f}{halves_s / two_s:>7.0%}\n")
        sys.stdout.flush()


def measure_first_row(rows: int, rounds: int, folder: Path) -> None:
    """Print the seconds until a program that was started has written the first row of a table, and Python's own start.

    As after an installation: Python's modules are compiled, and the files have been read before.
    """
    source, environment = folder / "products.csv", {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    make_table(source, rows)
    maps = ["--map", f"instruction={QUESTION}", "--map", "output=description"]
    prep = [sys.executable, "-m", "ftkit", "prep", str(source), "--template", "alpaca", *maps, "-q"]
    found: dict[str, list[float]] = {"python": [], "first row": []}
    for _ in range(rounds + 1):
        for name, command in (("python", [sys.executable, "-c", "print()"]), ("first row", prep)):
            started = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            ) as process:
                assert process.stdout is not None and process.stdout.readline()
                found[name].append(time.perf_counter() - started)
                process.kill()
    for name, seconds in found.items():
        kept = sorted(seconds[1:])
        sys.stdout.write(
            f"{name:<10} median {statistics.median(kept):.3f} s, least {kept[0]:.3f}, most {kept[-1]:.3f}\n"
        )


MOST_NEAR = 100_000
"""Rows of which near duplicates are looked for: it takes half a minute."""


def measure_memory(sizes: list[int], folder: Path) -> None:
    """Print the peak memory for tables of these numbers of rows."""
    source, out = folder / "products.csv", folder / "out.jsonl"
    sys.stdout.write(
        f"{'rows':>10}{'table MB':>10}{'plain MB':>10}{'dedupe MB':>11}{'bytes a row':>13}{'near MB':>9}\n"
    )
    for rows in sizes:
        make_table(source, rows)
        *_, plain = measure("ftkit --dedupe none", source, out)
        *_, deduped = measure("ftkit", source, out)
        kept, _ = fingerprint(out)
        table = source.stat().st_size / 2**20
        a_row = (deduped - plain) * 2**20 / kept
        near = f"{measure('ftkit', source, out, '--dedupe near')[-1]:.0f}" if rows <= MOST_NEAR else ""
        sys.stdout.write(f"{rows:>10,}{table:>10.0f}{plain:>10.0f}{deduped:>11.0f}{a_row:>13.1f}{near:>9}\n")
        sys.stdout.flush()


def main() -> None:
    """Run one way (as a child), or all of them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="pandas,datasets,ftkit,ftkit --dedupe none,ftkit --jobs 2")
    parser.add_argument("--memory", help="numbers of rows")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--work", default=",".join(WORK), help="what --scaling measures")
    parser.add_argument("--work-rows", type=int, default=30_000, help="rows of --scaling but for the plain ones")
    parser.add_argument("--first-row", action="store_true")
    parser.add_argument("--more", default="")
    parser.add_argument("--way")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.way:
        WAYS[asked.way](str(asked.source), str(asked.out), *asked.more.split())
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu, peak = sum(each.ru_utime + each.ru_stime for each in used), max(each.ru_maxrss for each in used)
        sys.stdout.write(f"\n{cpu:.2f} {peak / 1024:.0f}\n")
        return
    if asked.scaling or asked.first_row:
        with tempfile.TemporaryDirectory() as folder:
            if asked.first_row:
                measure_first_row(asked.rows, asked.rounds, Path(folder))
            if asked.scaling:
                sizes = {work: asked.work_rows if WORK[work] else asked.rows for work in asked.work.split(",")}
                measure_scaling(sizes, asked.rounds, Path(folder))
        return
    if asked.memory:
        with tempfile.TemporaryDirectory() as folder:
            measure_memory([int(number) for number in asked.memory.split(",")], Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "products.csv", Path(folder) / "out.jsonl"
        make_table(source, asked.rows)
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in asked.ways.split(",")}
        prints: dict[str, tuple[int, str]] = {}
        for _ in range(asked.rounds):
            for way, results in found.items():
                results.append(measure(way, source, out))
                prints[way] = fingerprint(out)
    middles = {
        way: [statistics.median(column) for column in zip(*results, strict=True)] for way, results in found.items()
    }
    seconds, cpu, _ = middles.get("ftkit", (math.nan, math.nan, 0))
    sys.stdout.write(f"{asked.rows:,} rows, {asked.rounds} rounds\n")
    sys.stdout.write(f"{'way':<22}{'s':>8}{'ratio':>8}{'CPU s':>8}{'ratio':>8}{'MB':>8}  rows, sha256\n")
    for way, (took, worked, peak) in middles.items():
        ratios = f"{took:>8.2f}{took / seconds:>8.2f}{worked:>8.2f}{worked / cpu:>8.2f}"
        sys.stdout.write(f"{way:<22}{ratios}{peak:>8.0f}  {prints[way]}\n")


if __name__ == "__main__":
    main()
