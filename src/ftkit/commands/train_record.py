"""run.json of a training run: what decided it, what happened in it, how it ended."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ftkit import __version__, console
from ftkit.commands.train_plan import NOT_IDENTITY, Prepared, base_facts
from ftkit.core.configuration import toml_value
from ftkit.core.train_settings import TrainSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.devices import dtype_name, peak_memory
from ftkit.io.run_folder import COMPLETE, RunFolder, mark_latest
from ftkit.io.trackers import Trackers, open_trackers
from ftkit.stopping import Stopped

NOT_REPEATED = ("dry_run", "json", "run", "resume", "allow_change", "time_limit", "force")
"""Settings of one command, not of the run: config.toml leaves them out."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def differences(info: dict[str, Any], prepared: Prepared) -> dict[str, str]:
    """What differs between a run on disk and the one asked for: setting -> in words."""
    old, new = info.get("settings", {}), settings_facts(prepared.settings)
    changed = {
        key: f"{key} {old.get(key)} -> {new[key]}"
        for key in new
        if (key not in NOT_IDENTITY or (key == "save_every" and new["early_stop"])) and old.get(key) != new[key]
    }
    if info.get("data", {}).get("sha256") != prepared.data.sha256:
        changed["rows"] = "rows"
    new_tokens = list(prepared.new_tokens.texts) if prepared.new_tokens else []
    if info.get("added_tokens", []) != new_tokens:
        changed["add_tokens"] = "new tokens"
    facts, known = base_facts(prepared.base, prepared.settings), info.get("model", {})
    if any(known.get(key) != value for key, value in facts.items()):
        changed["base"] = "base"
    return changed


def settings_facts(settings: TrainSettings) -> dict[str, Any]:
    """The resolved settings as JSON holds them."""
    return json.loads(json.dumps(asdict(settings)))  # type: ignore[no-any-return]


@contextmanager
def recorded(folder: RunFolder, prepared: Prepared, resumed: int | None) -> Iterator[tuple[dict[str, Any], Trackers]]:
    """run.json from the start: status running, then complete, or what ended the run.

    resumed: the step that the run goes on from; what an earlier part of it wrote stays.
    """
    info = first_facts(prepared)
    before = folder.read_info() if (folder.path / "run.json").is_file() else {}
    info["trackers"] = before.get("trackers", {})
    if resumed is not None:
        info["resumed_from"] = [*before.get("resumed_from", []), resumed]
        changed = list(differences(before, prepared).values())
        info["changes"] = before.get("changes", []) + ([{"step": resumed, "what": changed}] if changed else [])
    folder.write_info(info)  # first of all: a folder without it is no run
    started = time.perf_counter()
    trackers = None
    try:
        trackers = open_trackers(
            prepared.settings.tracker, folder, parameters(info), known=info["trackers"], done_steps=resumed or 0
        )
        info["trackers"] = trackers.known
        folder.write_info(info)
        folder.write_text("config.toml", config_text(prepared.settings))
        folder.write_rows("valid.jsonl", prepared.valid_rows)
        yield info, trackers
    except BaseException as error:
        info |= {"status": status_of(error), "error": str(error) or type(error).__name__}
        with suppress(OSError):  # a full disk must not hide what went wrong
            folder.write_info(info)
        if trackers is not None:
            trackers.end(info["status"])
        raise
    info |= {
        "status": COMPLETE,
        "seconds": round(time.perf_counter() - started, 2),
        "measured_peak_bytes": peak_memory(prepared.device),
    }
    folder.write_info(info)
    remember(folder, prepared)
    trackers.end(COMPLETE)


def remember(folder: RunFolder, prepared: Prepared) -> None:
    """runs/latest names this run. Where --run is elsewhere, a folder here that cannot be written is no fault of the run."""
    try:
        mark_latest(folder)
    except OSError as error:
        if prepared.settings.run is None:
            raise
        console.warn(f"runs/latest cannot be written ({error.strerror}): name the run to eval, merge and chat")


def parameters(info: dict[str, Any]) -> dict[str, Any]:
    """What trackers show beside the numbers: the resolved settings, and what they were applied to."""
    return {**info["settings"], **{key: info[key] for key in ("data", "model", "plan", "device", "dtype", "versions")}}


def status_of(error: BaseException) -> str:
    """How a run that is not complete ended."""
    if isinstance(error, KeyboardInterrupt | Stopped):
        return "stopped"
    ends = {ExitCode.STOPPED: "stopped", ExitCode.INTERRUPTED: "stopped", ExitCode.DIVERGED: "diverged"}
    return ends.get(error.exit_code, "failed") if isinstance(error, UserError) else "failed"


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
        "added_tokens": list(prepared.new_tokens.texts) if prepared.new_tokens else [],
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
    """The resolved settings as config.toml, which `ftkit train --config` repeats: those that the run has a use for."""
    settled = asdict(settings)
    left_out = {*NOT_REPEATED, *settings.unused(settled), *(key for key, value in settled.items() if value is None)}
    known = {key: value for key, value in settled.items() if key not in left_out}
    return "[train]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in known.items())
