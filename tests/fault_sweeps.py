"""Break `ftkit train` in every way that can be thought of, and see that nothing is lost. `make faults` runs all of it.

Each case begins a run, breaks it, types the same command again and compares what the run made with what an unbroken
one made, byte by byte. Runs are forked from one process that has loaded the libraries, so a case takes a second or two.

    python tests/fault_sweeps.py [--short] [--only F1,F3] [--write docs/reliability.md]
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
from train_shell import ROWS, files_in, without_lora, write_rows

from ftkit.io.checkpoint import checkpoint_path, checkpoint_steps, newest_checkpoint, read_checkpoint

COMMAND = ["train", "train.jsonl", "--steps", "8", "--batch", "8", "--r", "4", "--lr", "0.01", "--dropout", "0.1",
           "--run", "run", "--save-every", "3", "-q"]  # fmt: skip
STOPPED, INTERRUPTED, IO, MEMORY, DIVERGED, MODEL, EXISTS = 75, 130, 74, 5, 7, 4, 9
WRITES = ("staged", "write", "manifest", "rename", "renamed", "prune")
SIGNALS = {"int": INTERRUPTED, "term": STOPPED, "usr1": STOPPED, "hup": STOPPED}
PLACES = {"load": 1, "tokenise": 5, "pass": 3, "step": 4, "validation": 2, "staged": 1, "manifest": 2}
"""Where a signal comes, and at which passage: loading, tokenising, in a step, after it, validating, saving."""
LONGEST = 120
"""Seconds after which a run counts as hanging."""


@dataclass
class Tally:
    """What a sweep found. failures: what was broken and what did not hold then."""

    injected: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Arena:
    """A place for broken runs, with what unbroken ones make there."""

    root: Path
    model: Path
    expected: dict[str, dict[str, bytes]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def place(self) -> Path:
        """A new folder with the rows."""
        place = self.root / f"case-{next(self.numbers)}"
        place.mkdir()
        write_rows(place / "train.jsonl", ROWS[::2])
        return place

    def start(self, place: Path, options: list[str], fault: str = "", first: Callable[[], None] = lambda: None) -> int:
        """The process of one command; what it says goes to `place`/said."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.chdir(place)
            said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ["FTKIT_FAULT"] = fault
            first()
            from ftkit.cli import main

            command = without_lora(COMMAND) if "--full" in options else COMMAND
            main([*command, "--model", str(self.model), *options])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def run(self, place: Path, options: list[str], fault: str = "", first: Callable[[], None] = lambda: None) -> int:
        """Exit status of one command, negative for a signal that killed it."""
        return wait(self.start(place, options, fault, first))

    def unbroken(self, options: list[str]) -> dict[str, bytes]:
        """What the run makes when nothing goes wrong."""
        key = " ".join(options)
        if key not in self.expected:
            place = self.place()
            assert self.run(place, options) == 0, (place / "said").read_text()
            self.expected[key] = made(place)
            shutil.rmtree(place)
        return self.expected[key]


def wait(child: int) -> int:
    """Exit status, negative for a signal; a process that hangs is killed, which counts as -9 and is never asked for."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def made(place: Path) -> dict[str, bytes]:
    """The run's adapter or model."""
    folders = [place / "run" / name for name in ("adapter", "model") if (place / "run" / name).is_dir()]
    return files_in(folders[0]) if folders else {}


def settle(arena: Arena, tally: Tally, place: Path, options: list[str], what: str) -> None:
    """After a fault: whole checkpoints are whole, the same command ends well, the bytes are equal, no litter is left."""
    tally.injected += 1
    faults = []
    for step in checkpoint_steps(place / "run"):
        try:
            read_checkpoint(checkpoint_path(place / "run", step))
        except Exception as error:
            faults.append(f"checkpoint {step} is not whole: {error}")
    code = arena.run(place, options)
    if code != 0:
        faults.append(f"the same command again ended with {code}: {last_words(place)}")
    else:
        tally.compared += 1
        if made(place) != arena.unbroken(options):
            faults.append("other bytes than the unbroken run")
        faults += untrue(place)
        if litter := [str(path) for path in place.rglob(".tmp-*")]:
            faults.append(f"left behind: {litter}")
    if "Traceback" in (place / "said").read_text() or "internal error" in (place / "said").read_text():
        faults.append(f"a bug spoke: {last_words(place)}")
    tally.failures += [f"{what}: {fault}" for fault in faults]
    shutil.rmtree(place, ignore_errors=True)


def untrue(place: Path) -> list[str]:
    """What run.json, metrics.jsonl and runs/latest say wrongly of a run that ended well."""
    said = []
    if json.loads((place / "run" / "run.json").read_text())["status"] != "complete":
        said.append("run.json does not say complete")
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    if steps != list(range(1, len(steps) + 1)):
        said.append(f"metrics.jsonl tells the steps {steps}")
    if not (place / "runs" / "latest").is_file():
        said.append("runs/latest names no run")
    return said


def last_words(place: Path) -> str:
    """The last error that was said."""
    lines = [line for line in (place / "said").read_text().splitlines() if "error" in line]
    return lines[-1] if lines else "nothing"


def expect(tally: Tally, what: str, code: int, allowed: tuple[int, ...]) -> None:
    """Note a status that is none of those that are documented for this."""
    if code not in allowed:
        tally.failures.append(f"{what}: ended with {code}, not {' or '.join(map(str, allowed))}")


def every(stride: int, last: int | None = None) -> Iterator[int]:
    """1, 1 + stride, ...: passages of a place."""
    return itertools.takewhile(lambda n: last is None or n <= last, itertools.count(1, stride))


# ---------------------------------------------------------------- the sweeps
def killed_at_every_place(arena: Arena, short: bool) -> Tally:
    """F1: SIGKILL at every passage of every named place of a run: rows, steps, each part of each save."""
    tally = Tally()
    for options in ([], ["--early-stop", "5", "--keep", "1"]):
        for number in every(41 if short else 1, 130 if short else None):
            place = arena.place()
            code = arena.run(place, options, f"*:kill:{number}")
            if code == 0:
                shutil.rmtree(place)
                break
            expect(tally, f"passage {number}", code, (-signal.SIGKILL,))
            settle(arena, tally, place, options, f"killed at passage {number} {' '.join(options)}")
    return tally


def killed_at_every_file_operation(arena: Arena, short: bool) -> Tally:
    """F1: SIGKILL before every open, rename, mkdir and removal in the run's folder."""
    tally = Tally()
    watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
    for number in every(29 if short else 1, 120 if short else None):
        place = arena.place()
        seen = itertools.count(1)

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            path = str(arguments[0]) if event in watched else ""
            is_ours = event in watched and path.startswith(("run", str(place / "run")))  # noqa: B023
            if is_ours and next(seen) == number:  # noqa: B023  # the child dies in this round
                os.kill(os.getpid(), signal.SIGKILL)

        code = arena.run(place, [], first=lambda: sys.addaudithook(watch))
        if code == 0:
            shutil.rmtree(place)
            break
        settle(arena, tally, place, [], f"killed at file operation {number}")
    return tally


def killed_at_random_times(arena: Arena, short: bool) -> Tally:
    """F2: SIGKILL at random times, several in one run of 60 steps, until it is through; seeded."""
    tally, draw = Tally(), random.Random(42)
    options = ["--steps", "60"]
    expected = arena.unbroken(options)
    began = time.monotonic()
    place = arena.place()
    arena.run(place, options)
    length = time.monotonic() - began
    shutil.rmtree(place)
    while tally.injected < (3 if short else 200):
        place = arena.place()
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            child = arena.start(place, options)
            time.sleep(draw.uniform(0.1, 1.0) * length)
            os.kill(child, signal.SIGKILL)
            code = wait(child)
            tally.injected += code == -signal.SIGKILL
        tally.compared += 1
        if code != 0:
            tally.failures.append(f"ended with {code}: {last_words(place)}")
        elif made(place) != expected:
            tally.failures.append("other bytes than the unbroken run")
        shutil.rmtree(place, ignore_errors=True)
    return tally


def signalled_everywhere(arena: Arena, short: bool) -> Tally:
    """F3: each signal in each phase; the second SIGINT."""
    tally = Tally()
    cases = [(place, sent) for place in PLACES for sent in SIGNALS]
    for where, sent in cases[:: 5 if short else 1]:
        place = arena.place()
        code = arena.run(place, [], f"{where}:{sent}:{PLACES[where]}")
        expect(tally, f"{sent} at {where}", code, (SIGNALS[sent],))
        settle(arena, tally, place, [], f"{sent} at {where}")
    in_time = 0
    for number in every(
        40 if short else 1, 130 if short else None
    ):  # those that come after the last step find a run that ends well
        place = arena.place()
        code = arena.run(place, [], f"*:term:{number}")
        expect(tally, f"SIGTERM at passage {number}", code, (0, STOPPED))
        settle(arena, tally, place, [], f"SIGTERM at passage {number}")
        in_time += code == 0
        if in_time == (1 if short else 15):
            break
    for number in (2,) if short else (1, 2, 4, 6):
        place = arena.place()
        options = ["--pack", "off", "--micro-batch", "2"]
        code = arena.run(place, options, f"pass:int:{4 * number + 1},pass:int:{4 * number + 2}")
        expect(tally, f"SIGINT twice in step {number + 1}", code, (INTERRUPTED,))
        settle(arena, tally, place, options, f"SIGINT twice in step {number + 1}")
    return tally


def failed_at_every_write(arena: Arena, short: bool) -> Tally:
    """F4: every write fails in turn, with no space, an I/O error, an exceeded quota."""
    tally = Tally()
    for what in ("enospc",) if short else ("enospc", "eio", "edquot"):
        for where in WRITES[1:3] if short else WRITES:
            for number in every(17 if short else 1):
                place = arena.place()
                code = arena.run(place, [], f"{where}:{what}:{number}")
                if code == 0:
                    shutil.rmtree(place)
                    break
                expect(tally, f"{what} at {where} {number}", code, (IO,))
                settle(arena, tally, place, [], f"{what} at {where} {number}")
    return tally


def failed_beyond_a_size(arena: Arena, short: bool) -> Tally:
    """F4: the kernel refuses to write files beyond a size (RLIMIT_FSIZE), whoever writes them."""
    tally = Tally()
    for size in (20_000,) if short else (0, 100, 1000, 4000, 10_000, 20_000, 40_000, 80_000, 120_000):
        place = arena.place()

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: B023

        code = arena.run(place, ["--full"], first=limit)
        expect(tally, f"no file beyond {size} bytes", code, (IO,))
        settle(arena, tally, place, ["--full"], f"no file beyond {size} bytes")
    return tally


def damaged_in_every_file(arena: Arena, short: bool) -> Tally:
    """F6: every file of the newest checkpoint cut, deleted, one bit flipped at its start, middle and end."""
    tally = Tally()
    begun = arena.place()
    arena.run(begun, [], "step:term:5")
    newest = checkpoint_path(begun / "run", 5).relative_to(begun)
    damages: dict[str, Callable[[bytes], bytes | None]] = {
        "cut": lambda data: data[: len(data) // 2],
        "emptied": lambda data: b"",
        "deleted": lambda data: None,
        **{f"flipped at {share}": lambda data, share=share: flipped(data, share) for share in (0.0, 0.5, 0.999)},
    }
    cases = [(name, damage) for name in files_in(begun / newest) for damage in damages]
    for name, damage in cases[:: 13 if short else 1]:
        place = arena.place()
        shutil.copytree(begun / "run", place / "run")
        file = place / newest / name
        after = damages[damage](file.read_bytes())
        file.unlink() if after is None else file.write_bytes(after)
        found = in_silence(lambda: newest_checkpoint(place / "run"))  # noqa: B023
        if found is None or found.step != 3:
            tally.failures.append(f"{name} {damage}: accepted")
        settle_damaged(arena, tally, place, f"{name} {damage}")
    shutil.rmtree(begun)
    return tally


def in_silence(work: Callable[[], object]) -> object:
    """What `work` gives, its words on stderr left out."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):
        return work()


def flipped(data: bytes, share: float) -> bytes:
    """One bit changed."""
    at = int(len(data) * share)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else b"x"


def settle_damaged(arena: Arena, tally: Tally, place: Path, what: str) -> None:
    """As `settle`, of a run whose newest checkpoint is known to be damaged."""
    tally.injected += 1
    code = arena.run(place, [])
    tally.compared += code == 0
    if code != 0 or made(place) != arena.unbroken([]):
        tally.failures.append(f"{what}: ended with {code}, or with other bytes: {last_words(place)}")
    if "going back behind step 5" not in (place / "said").read_text():
        tally.failures.append(f"{what}: the step back was not said")
    shutil.rmtree(place)


def out_of_memory_at_every_pass(arena: Arena, short: bool) -> Tally:
    """F7: memory runs out in each pass in turn; with one row at once, and with several, which go on in smaller parts."""
    tally = Tally()
    single, pairs = (
        ["--pack", "off", "--micro-batch", "1"],
        ["--pack", "off", "--micro-batch", "4", "--dropout", "0", "--dtype", "fp32"],
    )
    expected = losses_of(arena, pairs)
    for number in every(29 if short else 3, 60):
        place = arena.place()
        expect(tally, f"pass {number}", arena.run(place, single, f"pass:memory:{number}"), (MEMORY,))
        settle(arena, tally, place, single, f"out of memory in pass {number}, one row at once")
    for number in every(11 if short else 1, 16):
        place = arena.place()
        tally.injected += 1
        code = arena.run(place, pairs, f"pass:memory:{number}")
        expect(tally, f"pass {number}", code, (0,))
        events = json.loads((place / "run" / "run.json").read_text()).get("events", [])
        if len(events) != 1 or "out of memory" not in events[0]["what"]:
            tally.failures.append(f"pass {number}: not recorded")
        if any(abs(a - b) > 1e-3 * b for a, b in zip(losses(place), expected, strict=True)):
            tally.failures.append(f"pass {number}: other losses")
        shutil.rmtree(place)
    for number in (3,) if short else (1, 2, 3, 4, 5):
        place = arena.place()
        options = ["--early-stop", "9", "--valid", "0.3", "--pack", "off", "--micro-batch", "4"]
        expect(tally, f"validation {number}", arena.run(place, options, f"validation:memory:{number}"), (0,))
        settle(arena, tally, place, options, f"out of memory in validation {number}")
    return tally


def losses_of(arena: Arena, options: list[str]) -> list[float]:
    """The losses of an unbroken run."""
    place = arena.place()
    arena.run(place, options)
    return losses(place)


def losses(place: Path) -> list[float]:
    """Those that metrics.jsonl tells."""
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def no_number_at_every_step(arena: Arena, short: bool) -> Tally:
    """F8: the loss, or a gradient, of each step in turn is no number."""
    tally = Tally()
    for where in ("loss", "gradient"):
        for number in every(4 if short else 1, 8):
            place = arena.place()
            expect(tally, f"{where} {number}", arena.run(place, [], f"{where}:nan:{number}"), (DIVERGED,))
            settle(arena, tally, place, [], f"NaN {where} in step {number}")
    return tally


def folder_moved_away(arena: Arena, short: bool) -> Tally:
    """F13: the run's folder is moved away while it trains; clocks that jump back."""
    tally = Tally()
    for wanted in (3,) if short else (1, 3, 5, 7):
        place = arena.place()
        child = arena.start(place, ["--steps", "200"])
        metrics = place / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") <= wanted:
            time.sleep(0.001)
        (place / "run").rename(place / "away")
        expect(tally, f"moved away after step {wanted}", wait(child), (IO,))
        (place / "away").rename(place / "run")
        options = ["--steps", "200"]
        settle(arena, tally, place, options, f"moved away after step {wanted}")
    place = arena.place()
    real, days = time.time, itertools.count()

    def jump() -> None:
        time.time = lambda: real() - 86400 * next(days)

    expect(tally, "clock back a day at each look", arena.run(place, [], "step:term:4", first=jump), (STOPPED,))
    settle(arena, tally, place, [], "clock back a day at each look")
    return tally


def two_at_once(arena: Arena, short: bool) -> Tally:
    """F14: two trainers on one folder."""
    tally = Tally()
    for _ in range(1 if short else 10):
        place = arena.place()
        tally.injected += 1
        children = [arena.start(place, ["--steps", "60"]) for _ in range(2)]
        codes = sorted(wait(child) for child in children)
        expect(tally, "the first of two", codes[0], (0,))
        expect(tally, "the second of two", codes[1], (EXISTS,))
        tally.compared += 1
        if made(place) != arena.unbroken(["--steps", "60"]):
            tally.failures.append("two at once: other bytes")
        shutil.rmtree(place)
    return tally


def changed_between(arena: Arena, short: bool) -> Tally:
    """F19: the run is gone on with under other settings, rows, base: refused, and nothing of it has changed."""
    tally = Tally()
    changes = [["--lr", "0.02"], ["--r", "8"], ["--seed", "7"], ["--batch", "4"], ["--targets", "q_proj"], ["--qlora"],
               ["--full"], ["--max-length", "64"], ["--valid", "0"], ["--optimizer", "sgd"], ["--steps", "9"]]  # fmt: skip
    for change in changes[:: 4 if short else 1]:
        place = arena.place()
        arena.run(place, [], "step:term:4")
        expect(tally, f"with {change}", arena.run(place, change), (MODEL,))
        settle(arena, tally, place, [], f"tried with {change}")
    place = arena.place()
    arena.run(place, [], "step:term:4")
    rows = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(rows * 2)
    expect(tally, "with other rows", arena.run(place, []), (MODEL,))
    (place / "train.jsonl").write_text(rows)
    settle(arena, tally, place, [], "tried with other rows")
    return tally


def forked_while_listening(arena: Arena, short: bool) -> Tally:
    """F20: a child that a library forks inherits the signal handler; a signal to it is not one to the run."""
    tally = Tally()
    place = arena.place()

    def fork_at_step() -> None:
        from ftkit import faults

        point = faults.point

        def fork(where: str) -> bool:
            if where == "step":
                child = os.fork()
                if not child:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os._exit(7)  # it is still there: the handler did not raise
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            return point(where)

        faults.point = fork

    expect(tally, "children that are signalled", arena.run(place, [], first=fork_at_step), (0,))
    settle(arena, tally, place, [], "children that are signalled")
    return tally


def fed_with_garbage(arena: Arena, short: bool) -> Tally:
    """F21: bytes of the rows, the settings file, the base's config and its weights are changed at random; --dry-run."""
    tally, draw = Tally(), random.Random(42)
    begun = arena.place()
    shutil.copytree(arena.model, begun / "base")
    (begun / "ftkit.toml").write_text('[train]\nlr = 0.01\nbatch = 8\nmodel = "base"\nsave_every = "3"\n')
    files = ["train.jsonl", "ftkit.toml", "base/config.json", "base/model.safetensors", "base/tokenizer.json",
             "base/tokenizer_config.json"]  # fmt: skip
    for number in range(12 if short else 500):
        name = files[number % len(files)]
        kept = (begun / name).read_bytes()
        (begun / name).write_bytes(spoiled(kept, draw))
        tally.injected += 1
        (begun / "said").unlink(missing_ok=True)
        code = wait(start_plain(arena, begun, ["train", "train.jsonl", "--dry-run", "--model", "base"]))
        if code not in (0, 2, 3, 4, 5):
            tally.failures.append(f"{name} {number}: ended with {code}: {last_words(begun)}")
        (begun / name).write_bytes(kept)
    shutil.rmtree(begun)
    return tally


def start_plain(arena: Arena, place: Path, arguments: list[str]) -> int:
    """A command of its own words."""

    def instead() -> None:
        from ftkit.cli import main

        main(arguments)

    return arena.start(place, [], first=instead)


def spoiled(data: bytes, draw: random.Random) -> bytes:
    """A few bytes in the first thousand replaced, removed or put in; or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(changed), 1000) or 1)
        kind = draw.randrange(4)
        if kind == 0:
            changed[at : at + 1] = draw.randbytes(1)
        elif kind == 1:
            del changed[at : at + draw.randint(1, 20)]
        elif kind == 2:
            changed[at:at] = draw.randbytes(draw.randint(1, 8))
        else:
            del changed[draw.randrange(len(changed) or 1) :]
    return bytes(changed)


SWEEPS: dict[str, list[Callable[[Arena, bool], Tally]]] = {
    "F1": [killed_at_every_place, killed_at_every_file_operation],
    "F2": [killed_at_random_times],
    "F3": [signalled_everywhere],
    "F4": [failed_at_every_write, failed_beyond_a_size],
    "F6": [damaged_in_every_file],
    "F7": [out_of_memory_at_every_pass],
    "F8": [no_number_at_every_step],
    "F13": [folder_moved_away],
    "F14": [two_at_once],
    "F19": [changed_between],
    "F20": [forked_while_listening],
    "F21": [fed_with_garbage],
}


def open_arena(root: Path) -> Arena:
    """A small model, and the libraries loaded: what every forked run begins with."""
    import bitsandbytes
    import peft
    import transformers
    from conftest import hear_signals, save_tiny_tokenizer, save_tiny_weights

    from ftkit import console
    from ftkit.commands import train  # noqa: F401

    assert bitsandbytes and peft and transformers
    hear_signals()
    console.set_level(console.QUIET)
    torch.set_num_threads(1)
    model = root / "model"
    child = os.fork()
    if not child:  # this process must not compute: torch's threads do not survive a fork
        save_tiny_tokenizer(model)
        save_tiny_weights(model)
        os._exit(0)
    assert wait(child) == 0
    return Arena(root, model)


HEAD = (
    "| fault | what is done | injected | survived | runs compared | equal to the byte |",
    "|---|---|--:|--:|--:|--:|",
)


def row_of(name: str, sweep: Callable[[Arena, bool], Tally], tally: Tally) -> str:
    """The result of a sweep as a line of a Markdown table."""
    failed = len({failure.split(": ")[0] for failure in tally.failures})
    equal = tally.compared - sum("other bytes" in failure for failure in tally.failures)
    numbers = [f"{number:,}" for number in (tally.injected, tally.injected - failed, tally.compared, equal)]
    return f"{beginning(name, sweep)} {' | '.join(numbers)} |"


def beginning(name: str, sweep: Callable[[Arena, bool], Tally]) -> str:
    """The cells that say which sweep it is."""
    return f"| {name} | {(sweep.__doc__ or '').split(': ', 1)[1].rstrip('.')} |"


def write_rows_of_table(file: Path, rows: list[str]) -> None:
    """Put the rows between their marks in a Markdown file; those of sweeps that were not run this time stay."""
    begin, end = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    known, _, after = rest.partition(end)
    places = [beginning(name, sweep) for name, sweeps in SWEEPS.items() for sweep in sweeps]
    found = {place: line for place in places for line in [*known.splitlines(), *rows] if line.startswith(place)}
    lines = [*HEAD, *(found[place] for place in places if place in found)]
    file.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def main() -> int:
    """Run the sweeps; exit 1 if anything did not hold."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--short", action="store_true", help="a few cases of each sweep")
    asked.add_argument("--only", default="", help="names of sweeps, separated by commas")
    asked.add_argument("--write", type=Path, help="Markdown file to put the table into")
    arguments = asked.parse_args()
    rows, is_well = [], True
    with tempfile.TemporaryDirectory(prefix="ftkit-faults-") as root:
        arena = open_arena(Path(root))
        for name, sweeps in SWEEPS.items():
            for sweep in sweeps if not arguments.only or name in arguments.only.split(",") else []:
                began = time.monotonic()
                tally = sweep(arena, arguments.short)
                seconds = time.monotonic() - began
                rows.append(row_of(name, sweep, tally))
                state = "all survived" if not tally.failures else f"{len(tally.failures)} FAILED"
                print(f"{name} {sweep.__name__}: {tally.injected} injected, {state}, {seconds:.0f} s", file=sys.stderr)
                for failure in tally.failures[:20]:
                    print(f"  {failure}", file=sys.stderr)
                is_well = is_well and not tally.failures
    print("\n".join([*HEAD, *rows]))
    if arguments.write and is_well:
        write_rows_of_table(arguments.write, rows)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
