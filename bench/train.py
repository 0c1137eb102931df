"""ftkit train against other programs' published commands, on the same rows:

    python bench/train.py --peer trl=VENV/bin --peer llamafactory=VENV/bin --peer litgpt=VENV/bin [--data alpaca]

Each program runs from an environment of its own (docs/performance.md says how to make one); what is not given is left
out. One round runs every program once with the same seed, the next round with the next seed. Medians are printed as
Markdown tables; --write puts them between their marks in a file. Only the ratios of one run count: machines and
moments differ.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from litgpt_adapter import convert_adapter
from train_jobs import BATCH, KINDS, Job, make_job, write_json
from train_ways import LIT_CHECKPOINT, WAYS, Way, environment

HERE = Path(__file__).resolve().parent
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class Run:
    """One command that was run: seconds by the clock, of CPU, and of its loop; its largest process; what it trained."""

    wall: float
    cpu: float
    loop: float
    peak_mb: float
    adapter: Path


def main() -> None:
    """Measure what was asked for; print, and write, a table for each data set."""
    asked = parse_arguments()
    peers = {name: Path(folder).absolute() for name, folder in (peer.split("=", 1) for peer in asked.peer)}
    for name in {way.peer for way in WAYS} - {None, *peers}:
        say(f"{name}: left out, no --peer {name}=VENV/bin")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(asked.work or temporary).absolute()
        for name in KINDS if asked.data == "all" else [asked.data]:
            try:
                job = make_job(name, asked.shared, work, asked.steps)
            except FileNotFoundError as error:
                say(f"{name}: left out, there is no {error.filename}")
                continue
            table = measure(job, choose_ways(job, peers, asked.way), peers, asked.rounds)
            sys.stdout.write(table + "\n\n")
            sys.stdout.flush()
            if asked.write:
                write_between_marks(asked.write, job.name, table)


def choose_ways(job: Job, peers: dict[str, Path], asked: list[str] | None) -> list[Way]:
    """ftkit, and the programs that are there, were asked for and can train the same tokens."""
    able = [way for way in WAYS if way.name in KINDS[job.name].ways and way.peer in (None, *peers)]
    return [way for way in able if way.peer is None or asked is None or way.name in asked]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=VENV/bin", help="trl, llamafactory, litgpt"
    )
    parser.add_argument("--way", action="append", help=f"only these: {', '.join(way.name for way in WAYS[1:])}")
    parser.add_argument("--data", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (of stories260k: ten times as many)")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared", help="folder of data and models")
    parser.add_argument("--work", help="keep models, logs and adapters here")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between their marks in this file")
    return parser.parse_args()


def measure(job: Job, ways: list[Way], peers: dict[str, Path], rounds: int) -> str:
    """The table of one data set. A program that fails is said and left out from there on."""
    if "litgpt" in [way.peer for way in ways]:
        prepare_litgpt(job, peers["litgpt"])
    runs: dict[str, list[Run]] = {way.name: [] for way in ways}
    ceiling = 0.0
    for seed in range(1, rounds + 1):
        ceiling = max(ceiling, matmul_ceiling())
        for name in list(runs):
            [way] = [way for way in ways if way.name == name]
            say(f"{job.name}, round {seed} of {rounds}: {name}")
            try:
                run = run_once(way, job, job.folder / f"{name}-{seed}", seed, peers)
            except (subprocess.SubprocessError, IndexError, OSError) as error:
                if way.peer is None:
                    raise
                say(f"  failed, left out from here on: {error}; its log is {job.folder / name}-{seed}.log")
                del runs[name]
                continue
            say(f"  {run.wall:.1f} s, {run.cpu:.1f} s of CPU, loop {run.loop:.1f} s")
            runs[name].append(run)
    untrained, losses = held_out_losses(job, runs)
    return table_of(job, runs, losses, untrained, ceiling, peers)


def run_once(way: Way, job: Job, out: Path, seed: int, peers: dict[str, Path]) -> Run:
    """What one command took."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    programs = peers[way.peer] if way.peer else None
    command = way.command(job, out, seed)
    if programs is not None:
        command[0] = str(programs / command[0])
    log = out.with_name(out.name + ".log")
    wall, cpu, peak_mb = run_measured(command, log, environment(way, programs, out, THREADS), out)
    loop = way.loop_seconds(log.read_text(encoding="utf-8", errors="replace"), out)
    adapter = out / way.adapter
    if way.peer == "litgpt":
        adapter = convert_adapter(adapter / "lit_model.pth.lora", job.model, out / "adapter")
    return Run(wall, cpu, loop, peak_mb, adapter)


def run_measured(command: list[str], log: Path, env: dict[str, str], folder: Path) -> tuple[float, float, float]:
    """(seconds by the clock, seconds of CPU, peak MB of the largest process) of a command and all that it starts."""
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)  # of all processes below, once they have been waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, Path(command[0]).name)
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def held_out_losses(job: Job, runs: dict[str, list[Run]]) -> tuple[float, dict[str, list[float]]]:
    """Nats per trained token on rows that nobody trained: (without an adapter, with those of each program)."""
    rows = write_json(job.folder / "valid.json", job.valid)
    adapters = [str(run.adapter) for found in runs.values() for run in found]
    command = [sys.executable, str(HERE / "train_loss.py"), str(job.model), str(rows), *adapters]
    untrained, *rest = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    losses = iter(rest)
    return untrained, {name: [next(losses) for _ in found] for name, found in runs.items()}


def prepare_litgpt(job: Job, programs: Path) -> None:
    """The model as LitGPT reads it; once."""
    out = job.folder.parent / LIT_CHECKPOINT
    if not (out / "lit_model.pth").is_file():
        command = [str(programs / "python"), str(HERE / "litgpt_checkpoint.py"), str(job.model), str(out)]
        subprocess.run(command, check=True, env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"})


def matmul_ceiling() -> float:
    """The best of several products of 2048 x 2048 matrices in bfloat16, in GFLOP/s."""
    torch.set_num_threads(THREADS)
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times) / 1e9


def useful_flops(job: Job) -> float:
    """Of all steps: forward and gradients of activations, 4 per weight and token; the head at trained tokens only.

    As if each row were computed alone; attention and the adapter are left out.
    """
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    key_values = width * config["num_key_value_heads"] // config["num_attention_heads"]
    block = 2 * width * width + 2 * width * key_values + 3 * width * inner
    return 4.0 * (layers * block * job.tokens + config["vocab_size"] * width * job.counted)


def table_of(
    job: Job,
    runs: dict[str, list[Run]],
    losses: dict[str, list[float]],
    untrained: float,
    ceiling: float,
    peers: dict[str, Path],
) -> str:
    """Medians, and medians of the ratios within rounds, as Markdown."""
    seeds = len(runs["ftkit"])
    lines = [
        f"{KINDS[job.name].title}: {job.rows:,} rows, {job.steps} steps of {BATCH}, {job.tokens:,} tokens, {job.counted:,}"
        f" of them trained; {seeds} round{'s' if seeds > 1 else ''}, {time.strftime('%Y-%m-%d')}; {THREADS} threads;"
        f" bf16 products reach {ceiling:,.0f} GFLOP/s; held-out loss before training {untrained:.4f}.",
        f"ftkit {version('ftkit')}, torch {torch.__version__}, " + ", ".join(peer_versions(peers)) + ".",
        "",
        "| | wall s | CPU s | loop tokens/s | peak MB | ftkit's loop is | its command | share of ceiling | held-out loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [table_line(job, name, found, runs["ftkit"], losses[name], ceiling) for name, found in runs.items()]
    return "\n".join(lines)


def table_line(job: Job, name: str, found: list[Run], ours: list[Run], losses: list[float], ceiling: float) -> str:
    """One program's medians, and how many times as fast ftkit's loop and whole command are."""
    loop = median(run.loop for run in found)
    faster = [
        f"{median(getattr(run, what) / getattr(our, what) for run, our in zip(found, ours, strict=True)):.2f}x"
        for what in ("loop", "wall")
    ]
    cells = [
        name,
        f"{median(run.wall for run in found):.1f}",
        f"{median(run.cpu for run in found):.1f}",
        f"{job.tokens / loop:,.0f}",
        f"{median(run.peak_mb for run in found):,.0f}",
        *(["", ""] if found is ours else faster),
        f"{useful_flops(job) / loop / ceiling / 1e9:.0%}",
        f"{median(losses):.4f}" + (f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(losses) > 1 else ""),
    ]
    return f"| {' | '.join(cells)} |"


def peer_versions(peers: dict[str, Path]) -> list[str]:
    """Name and version of each program, with the torch and transformers that it runs on."""
    return [f"{name} {found[name]} ({on(found)})" for name, found in ((n, versions(at)) for n, at in peers.items())]


def versions(programs: Path) -> dict[str, str]:
    """Versions of all packages of an environment."""
    command = [str(programs / "python"), "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return {package["name"]: package["version"] for package in listed}


def on(found: dict[str, str]) -> str:
    """The libraries below a program."""
    return ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers") if name in found)


def write_between_marks(path: Path, name: str, table: str, script: str = "train.py") -> None:
    """Replace what stands between <!-- SCRIPT NAME --> and <!-- end -->."""
    text = path.read_text(encoding="utf-8")
    mark, end = f"<!-- {script} {name} -->\n", "<!-- end -->"
    before, _, rest = text.partition(mark)
    if not rest:
        sys.exit(f"{path} has no line {mark.strip()}")
    path.write_text(before + mark + table + "\n" + end + rest.partition(end)[2], encoding="utf-8")


def say(text: str) -> None:
    """To stderr, so that stdout is tables only."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
