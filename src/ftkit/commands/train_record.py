"""The folder of a training run: found, made, and told from first to last what happens in it."""

import json
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ftkit import __version__
from ftkit.commands.train_plan import NOT_IDENTITY, Prepared, base_facts
from ftkit.core.configuration import toml_value
from ftkit.core.settings import TrainSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.devices import dtype_name
from ftkit.io.run_folder import COMPLETE, RunFolder, find_complete, mark_latest, new_run

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def find_done(prepared: Prepared) -> RunFolder | None:
    """The complete run that did just this already: in --run, or anywhere in runs/, where it becomes the latest."""
    asked = prepared.settings.run
    if asked is None:
        done = find_complete(prepared.identity)
        if done is not None:
            mark_latest(done)
        return done
    run_folder = RunFolder(Path(asked))
    if not (run_folder.path / "run.json").is_file():
        return None
    info = run_folder.read_info()
    is_same = info.get("status") == COMPLETE and info.get("identity") == prepared.identity
    return run_folder if is_same else None


def refuse_other_run(prepared: Prepared) -> None:
    """A run that --run names and that is not complete is exit 9; one of other settings or rows exit 4, with which."""
    asked = prepared.settings.run
    if asked is None or not Path(asked).exists():
        return
    info = RunFolder(Path(asked)).read_info()
    if info.get("status") != COMPLETE:
        hint = "remove it, or give another --run"
        raise UserError(
            f"{asked} exists and its run is not complete (status: {info.get('status')})", ExitCode.EXISTS, hint=hint
        )
    if info.get("identity") != prepared.identity:
        changed = ", ".join(differences(info, prepared)) or "the held-out rows or the template"
        raise UserError(f"{asked} holds another run; different: {changed}", ExitCode.MODEL, hint="give another --run")


def make_folder(prepared: Prepared) -> RunFolder:
    """The new folder of the run."""
    if prepared.settings.run is None:
        return new_run(prepared.base.short_name, prepared.identity)
    folder = RunFolder(Path(prepared.settings.run))
    folder.path.mkdir(parents=True)
    return folder


def differences(info: dict[str, Any], prepared: Prepared) -> list[str]:
    """What differs between a run on disk and the one asked for, in words."""
    old, new = info.get("settings", {}), settings_facts(prepared.settings)
    changed = [
        f"{key} {old.get(key)} -> {new[key]}" for key in new if key not in NOT_IDENTITY and old.get(key) != new[key]
    ]
    changed += ["rows"] if info.get("data", {}).get("sha256") != prepared.data.sha256 else []
    facts, known = base_facts(prepared.base, prepared.settings), info.get("model", {})
    return changed + (["base"] if any(known.get(key) != value for key, value in facts.items()) else [])


def settings_facts(settings: TrainSettings) -> dict[str, Any]:
    """The resolved settings as JSON holds them."""
    return json.loads(json.dumps(asdict(settings)))  # type: ignore[no-any-return]


@contextmanager
def recorded(folder: RunFolder, prepared: Prepared) -> Iterator[dict[str, Any]]:
    """run.json from the start: status running, then complete, or what ended the run."""
    info = first_facts(prepared)
    folder.write_info(info)
    folder.write_text("config.toml", config_text(prepared.settings))
    folder.write_rows("valid.jsonl", prepared.valid_rows)
    started = time.perf_counter()
    try:
        yield info
    except BaseException as error:
        info["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        info["error"] = str(error)
        folder.write_info(info)
        raise
    info |= {
        "status": COMPLETE,
        "seconds": round(time.perf_counter() - started, 2),
        "measured_peak_bytes": measured_peak(prepared.device),
    }
    folder.write_info(info)


def first_facts(prepared: Prepared) -> dict[str, Any]:
    """What run.json says before the first step."""
    data, base = prepared.data, prepared.base
    return {
        "status": "running",
        "identity": prepared.identity,
        "argv": shlex.join(["ftkit", *sys.argv[1:]]),
        "versions": {"ftkit": __version__, "python": platform.python_version(), **library_versions()},
        "settings": settings_facts(prepared.settings),
        "data": data_facts(prepared),
        "model": {"id": base.name, "location": base.location, **base_facts(base, prepared.settings)},
        "template": data.template.fingerprint if data.template else None,
        "device": prepared.device,
        "dtype": dtype_name(prepared.dtype),
        "plan": asdict(prepared.plan),
    }  # fmt: skip


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """The rows of a run, and what became of them."""
    data, ledger = prepared.data, prepared.ledger
    counts = {key: value for key, value in asdict(ledger).items() if key not in ("rows", "kept")}
    known = {"path": data.source, "sha256": data.sha256, "rows": len(data.rows)}
    return {**known, **counts, "held_out": len(prepared.valid_rows)}


def library_versions() -> dict[str, str | None]:
    """What numbers depend on."""
    return {name: installed_version(name) for name in LIBRARIES}


def installed_version(name: str) -> str | None:
    """Of a library, without importing it; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def config_text(settings: TrainSettings) -> str:
    """The resolved settings as config.toml, which `ftkit train --config` repeats."""
    known = {
        key: value
        for key, value in asdict(settings).items()
        if value is not None and key not in ("dry_run", "json", "run")
    }
    return "[train]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in known.items())


def measured_peak(device: str) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
