"""The folder of a training run: run.json, config.toml, metrics.jsonl, valid.jsonl, adapter/ or model/; runs/latest."""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ftkit import faults
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_file, sync_file

RUNS = Path("runs")
LATEST = RUNS / "latest"
SCHEMA = "ftkit.run/1"
COMPLETE = "complete"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole model, where every weight was trained."""
        return self.path / "model"

    @property
    def trained(self) -> Path:
        """What the run made: adapter/ or model/."""
        return self.model if self.model.is_dir() else self.adapter

    @property
    def valid(self) -> Path:
        """The rows that the run held out."""
        return self.path / "valid.jsonl"

    @property
    def metrics(self) -> Path:
        """A line for each step and each validation."""
        return self.path / "metrics.jsonl"

    @property
    def merged(self) -> Path:
        """Where merge puts the merged model."""
        return self.path / "merged"

    def write_info(self, info: dict[str, Any]) -> None:
        """run.json, replaced as a whole."""
        self.path.stat()  # fails where somebody took the run away: it must not begin anew from here
        with atomic_file(self.path / "run.json") as file:
            file.write(json.dumps({"schema": SCHEMA, **info}, indent=1, ensure_ascii=False) + "\n")

    def read_info(self) -> dict[str, Any]:
        """run.json; damaged or absent is exit 4."""
        try:
            info = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: no run.json, so it is no run folder",
                ExitCode.MODEL,
                hint="runs are in runs/; train makes one",
            ) from None
        except (ValueError, RecursionError):
            info = None
        if not isinstance(info, dict):
            raise UserError(
                f"{self.path / 'run.json'}: damaged",
                ExitCode.MODEL,
                hint="copy it back, or give another --run; its checkpoints are adapters that chat and eval open",
            )
        return info

    def log(self, line: dict[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        faults.point("write")
        with self.metrics.open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if not self.metrics.is_file():
            return []
        return [orjson.loads(line) for line in self.metrics.read_bytes().splitlines()]

    def cut_log(self, size: int) -> None:
        """Leave the first `size` bytes of metrics.jsonl: what was logged later is done again."""
        if self.log_size() > size:
            os.truncate(self.metrics, size)

    def log_size(self) -> int:
        """Bytes of metrics.jsonl, flushed to the disk."""
        if not self.metrics.is_file():
            return 0
        sync_file(self.metrics)
        return self.metrics.stat().st_size

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows as JSONL in the run folder."""
        with atomic_file(self.path / name, "wb") as file:
            for row in rows:
                file.write(orjson.dumps(row) + b"\n")

    def write_text(self, name: str, text: str) -> None:
        """A text file of the run, replaced as a whole."""
        with atomic_file(self.path / name) as file:
            file.write(text)


def new_run(model_name: str, identity: str) -> RunFolder:
    """A new folder runs/<time>-<model>-<4 hex of the identity>."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RUNS / f"{stamp}-{model_name}-{identity[:4]}"
    while path.exists():
        path = RUNS / f"{stamp}-{model_name}-{identity[:4]}-{secrets.token_hex(2)}"
    path.mkdir(parents=True)
    return RunFolder(path)


def runs_here() -> Iterator[tuple[RunFolder, dict[str, Any]]]:
    """Every run in runs/ with its run.json, newest first; a damaged one must not keep others from being trained."""
    for file in sorted(RUNS.glob("*/run.json"), reverse=True):
        with suppress(UserError):
            run = RunFolder(file.parent)
            yield run, run.read_info()


def find_run(identity: str, *, complete: bool) -> RunFolder | None:
    """The newest run in runs/ with this identity that is complete, or that is not."""
    for run, info in runs_here():
        is_complete = info.get("status") == COMPLETE and run.trained.is_dir()
        if info.get("identity") == identity and is_complete == complete:
            return run
    return None


def unfinished_runs() -> Iterator[tuple[RunFolder, dict[str, Any]]]:
    """Runs in runs/ that are not complete, newest first."""
    return ((run, info) for run, info in runs_here() if info.get("status") != COMPLETE)


def mark_latest(run: RunFolder) -> None:
    """runs/latest holds the name of the run that completed last, where that run is in runs/; else its path."""
    RUNS.mkdir(exist_ok=True)
    inside = run.path.resolve().parent == RUNS.resolve()
    with atomic_file(LATEST) as file:
        file.write((run.path.name if inside else str(run.path.resolve())) + "\n")


def latest_run() -> RunFolder | None:
    """The run that completed last in this folder; None if there is none."""
    try:
        name = LATEST.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return RunFolder(RUNS / name) if name and (RUNS / name / "run.json").is_file() else None


def require_latest() -> RunFolder:
    """The run that completed last; where there is none, exit 4 and the command to type."""
    run = latest_run()
    if run is None:
        raise UserError(
            "no run here yet (runs/latest names none)",
            ExitCode.MODEL,
            hint="ftkit train train.jsonl --qlora --r 8 --targets all-linear",
        )
    return run


def open_run(path: str) -> RunFolder:
    """A run by its folder; one that is not complete is exit 4."""
    run = RunFolder(Path(path))
    if not run.path.is_dir():
        raise UserError(f"{path}: no such run folder", ExitCode.MODEL, hint=nearest_run(run.path))
    status = run.read_info().get("status")
    if status != COMPLETE:
        raise UserError(
            f"{path}: the run is not complete (status: {status})", ExitCode.MODEL, hint="train it to the end first"
        )
    return run


def nearest_run(path: Path) -> str:
    """A hint with the run of the most similar name, or where runs are."""
    from difflib import get_close_matches

    names = [info.parent.name for info in path.parent.glob("*/run.json")]
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean '{path.parent / near[0]}'?" if near else "ls runs/"
