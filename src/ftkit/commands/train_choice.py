"""Which run a `ftkit train` command means: one that is complete, one to go on with, or a new one."""

from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.commands.train_plan import Prepared
from ftkit.commands.train_record import differences, remember
from ftkit.errors import ExitCode, UserError
from ftkit.io.run_folder import COMPLETE, RunFolder, find_run, new_run, unfinished_runs
from ftkit.io.run_lock import is_locked

SAFE_CHANGES = (
    "dropout", "early_stop", "epochs", "gradient_checkpointing", "label_smoothing", "lr", "max_grad_norm",
    "micro_batch", "micro_tokens", "neftune", "offload_activations", "pack", "save_every", "schedule", "share_prefix",
    "steps", "warmup", "weight_decay",
)  # fmt: skip
"""Settings that may change while a run goes on: the state of its checkpoint still means the same."""


def find_done(prepared: Prepared) -> RunFolder | None:
    """The complete run that did just this already: in --run, or anywhere in runs/; it becomes the latest."""
    asked = prepared.settings.run
    if prepared.settings.resume == "never":
        return None
    done = (
        find_run(prepared.identity, complete=True) if asked is None else complete_run(RunFolder(Path(asked)), prepared)
    )
    if done is not None:
        remember(done, prepared)
    return done


def complete_run(run: RunFolder, prepared: Prepared) -> RunFolder | None:
    """The run if it is complete and the one that is asked for."""
    if not (run.path / "run.json").is_file():
        return None
    info = run.read_info()
    is_whole = info.get("status") == COMPLETE and run.trained.is_dir()
    return run if is_whole and info.get("identity") == prepared.identity else None


def refuse_other_run(prepared: Prepared) -> None:
    """A run that --run names and that did, or was doing, something else is exit 4, with what differs.

    --allow-change lets an unfinished one go on with other settings where these are safe to change.
    """
    asked = prepared.settings.run
    if asked is None or not (Path(asked) / "run.json").exists():
        return
    info = RunFolder(Path(asked)).read_info()
    if info.get("identity") == prepared.identity:
        if prepared.settings.resume == "never":
            hint = "leave out --resume never, or give another --run"
            state = "this run" if info.get("status") == COMPLETE else "this run, unfinished"
            raise UserError(f"{asked} holds {state}", ExitCode.EXISTS, hint=hint)
        return
    changed = differences(info, prepared)
    words = ", ".join(changed.values()) or "the held-out rows or the template"
    unsafe = [changed[key] for key in changed if key not in SAFE_CHANGES] if changed else [words]
    if info.get("status") == COMPLETE or not prepared.settings.allow_change or unsafe:
        raise UserError(
            f"{asked} holds another run; different: {words}", ExitCode.MODEL, hint=change_hint(info, unsafe)
        )


def change_hint(info: dict[str, Any], unsafe: list[str]) -> str:
    """What to type about a run that is not the one asked for."""
    if info.get("status") == COMPLETE:
        return "give another --run"
    if unsafe:
        return f"give another --run; a run cannot go on with: {', '.join(unsafe)}"
    return "--allow-change goes on with the new settings; or give another --run"


def choose_folder(prepared: Prepared) -> RunFolder:
    """The folder of the run: that of an unfinished one to go on with, or a new one."""
    asked = prepared.settings.run
    if asked is not None:
        folder = RunFolder(Path(asked))
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder
    if prepared.settings.resume == "auto":
        begun = find_run(prepared.identity, complete=False)
        if begun is not None:
            return begun
        name_nearest(prepared)
    return new_run(prepared.base.short_name, prepared.identity)


def name_nearest(prepared: Prepared) -> None:
    """Say which unfinished run is most like the one that begins, and what differs: a typing slip is seen at once."""
    near = [(differences(info, prepared), run) for run, info in unfinished_runs() if not is_locked(run.path)]
    near = [(changed, run) for changed, run in near if changed and "rows" not in changed]
    if near:
        changed, run = min(near, key=lambda pair: len(pair[0]))
        console.info(f"a new run; {run.path} is unfinished and differs in: {', '.join(changed.values())}")
