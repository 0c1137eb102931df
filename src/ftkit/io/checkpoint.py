"""Checkpoints of a run: checkpoints/step-000120/, each whole or not there, each checked before it is used.

A checkpoint is an adapter (or a model) as any tool reads it, with training/ beside it: state.safetensors and
state.json, from which the run goes on. manifest.json, written last, has the sha256 of every file.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ftkit import console, faults
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_folder, check_manifest, read_manifest, remove_leftovers

FOLDER = "checkpoints"
TRAINING = "training"
SCHEMA = "ftkit.checkpoint/1"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its files checked: what was done by then is in `values`, tensors are read on demand."""

    path: Path
    step: int
    values: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the training state, on the CPU."""
        return load_file(self.path / TRAINING / "state.safetensors")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after a step is."""
    return run / FOLDER / f"step-{step:06d}"


def write_checkpoint(
    run: Path, step: int, fill: Callable[[Path], None], tensors: dict[str, Tensor], values: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step; `fill` puts the trained weights into its folder."""
    path = checkpoint_path(run, step)
    path.parent.mkdir(exist_ok=True)  # fails where somebody took the run away: it must not begin anew from here
    with atomic_folder(path, replace=True) as folder:
        fill(folder)
        (folder / TRAINING).mkdir()
        faults.point("write")
        save_file(tensors, folder / TRAINING / "state.safetensors")
        faults.point("write")
        text = json.dumps({"schema": SCHEMA, "step": step, **values}, allow_nan=False)
        (folder / TRAINING / "state.json").write_text(text, encoding="utf-8")
    return path


def step_of(path: Path) -> int | None:
    """The step that a folder's name says; None for other folders."""
    found = re.fullmatch(r"step-(\d{6,})", path.name)
    return int(found[1]) if found else None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    folder = run / FOLDER
    return sorted(s for path in folder.glob("step-*") if (s := step_of(path)) is not None) if folder.is_dir() else []


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest one that is whole, as are those that it needs; others are named and passed over. None: there is none.

    A checkpoint of a run that stops early needs the best one, which the run will give in the end.
    """
    if (run / FOLDER).is_dir():
        remove_leftovers(run / FOLDER, all_hosts=True)  # the run is locked: nobody else is making anything there
    for step in reversed(checkpoint_steps(run)):
        path = checkpoint_path(run, step)
        try:
            found = read_checkpoint(path)
            for needed in found.values["needs"]:
                read_checkpoint(checkpoint_path(run, needed))
            return found
        except UserError as error:
            what = error.message
        except OSError as error:
            what = f"{path}: {error.strerror}"
        console.warn(f"{what}: going back behind step {step:,}")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint; exit 4 names the one that is damaged or missing."""
    if read_manifest(path) is None:
        raise damaged(path, "manifest.json is missing")
    check_manifest(path)
    file = path / TRAINING / "state.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise damaged(path, "training/state.json is missing or no JSON") from None
    if values.get("schema") != SCHEMA or values.get("step") != step_of(path):
        raise damaged(path, f"training/state.json is not of this step, or not of this version ({SCHEMA})")
    if not (path / TRAINING / "state.safetensors").is_file():
        raise damaged(path, "training/state.safetensors is missing")
    return Checkpoint(path, values["step"], values)


def damaged(path: Path, what: str) -> UserError:
    """Exit 4 for a checkpoint that cannot be gone on from."""
    return UserError(f"{path}: {what}", ExitCode.MODEL, hint="remove it, and the run goes on from the one before")


def prune_checkpoints(run: Path, kept: Collection[int]) -> None:
    """Remove the checkpoints of all other steps."""
    for step in checkpoint_steps(run):
        if step not in kept:
            faults.point("prune")
            shutil.rmtree(checkpoint_path(run, step))
