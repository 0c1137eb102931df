"""Which inputs were named: files, folders, patterns, stdin and hub data sets, each perhaps with a weight."""

import glob
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ftkit.errors import ExitCode, UserError
from ftkit.io.jsonl import STDIN

HUB = "hf:"
PACKED = (".gz", ".zst")
DATA_SUFFIXES = (".csv", ".tsv", ".tab", ".psv", ".ssv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".md")


@dataclass(frozen=True)
class Source:
    """One input to read; `group` numbers the argument that named it, whose weight it shares."""

    name: str
    group: int = 0


@dataclass(frozen=True)
class Sources:
    """All inputs in order, and the weights of the arguments, which sum to 1; None where none was given."""

    inputs: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def find_sources(arguments: Sequence[str]) -> Sources:
    """The inputs behind what was typed: `a.csv`, `folder`, `'*.csv'`, `-`, `hf:org/name:train`, `a.jsonl=0.7`."""
    parts = [split_weight(argument) for argument in arguments]
    weights = [weight for _, weight in parts if weight is not None]
    if weights and len(weights) < len(parts):
        bare = next(name for name, weight in parts if weight is None)
        raise UserError(
            f"{bare} has no weight, other inputs do", ExitCode.USAGE, hint="weigh all or none: a.jsonl=0.7 b.jsonl=0.3"
        )
    inputs: list[Source] = []
    notes: list[str] = []
    for group, (name, _) in enumerate(parts):
        found = expand(name)
        if found != [name]:
            notes.append(f"{name}: {len(found):,} file{'' if len(found) == 1 else 's'}")
        inputs += [Source(each, group) for each in found]
    return Sources(tuple(inputs), normal(weights) if weights else None, tuple(notes))


def split_weight(argument: str) -> tuple[str, float | None]:
    """(`a.jsonl`, 0.7) of `a.jsonl=0.7`; a file whose name holds the = is just that file."""
    name, _, weight = argument.rpartition("=")
    if not name or os.path.exists(argument):
        return argument, None
    try:
        number = float(weight)
    except ValueError:
        if not os.path.exists(name):
            return argument, None
        number = math.nan
    if not 0 < number < math.inf:
        hint = "a weight is a number above 0: a.jsonl=0.7 b.jsonl=0.3"
        if number == 0:
            hint = "a weight of 0 takes no row of its input: leave it out"
        raise UserError(f"{argument}: '{weight}' is no weight", ExitCode.USAGE, hint=hint)
    return name, number


def normal(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights as shares of 1; 70 and 30 mean what 0.7 and 0.3 mean."""
    return tuple(weight / sum(weights) for weight in weights)


def expand(name: str) -> list[str]:
    """The files that a folder or a pattern stands for, sorted; any other name stands for itself."""
    if name == STDIN or name.startswith(HUB) or os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        return files_below(Path(name))
    if glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise UserError(f"{name}: no such file", ExitCode.DATA, hint="no file matches the pattern")
        return found
    return [name]


def files_below(folder: Path) -> list[str]:
    """The data files in a folder and the folders in it, sorted; hidden ones are passed over."""
    below = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [str(path) for path in visible if inner_suffix(path.name) in DATA_SUFFIXES]
    if not found:
        raise UserError(
            f"{folder} is a directory without data files",
            ExitCode.DATA,
            hint=f"prep reads {', '.join(DATA_SUFFIXES)} in it, also with .gz or .zst behind",
        )
    return found


def inner_suffix(name: str) -> str:
    """The suffix that tells a file's format: `.csv` of `a.csv.gz`; lower case."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in PACKED else path.suffix
