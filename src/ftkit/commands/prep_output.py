"""Where prep's rows go: stdout, a file, or the files of a split."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ftkit.core.prep_settings import PrepSettings
from ftkit.core.row_ledger import Ledger
from ftkit.core.row_making import Made
from ftkit.core.row_runs import Together
from ftkit.core.splitting import Stratifier, parse_shares, part_of
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_folder, read_manifest
from ftkit.io.jsonl import STDIN, lines_output, rows_output

Row = dict[str, Any]
Write = Callable[[Made | Together], Any]
"""Writes a row, or several together; returns the name of the part of the split that it went to, if there is one."""


def to_file(settings: PrepSettings) -> bool:
    """True if the rows go to a file or folder and not to stdout."""
    return bool(settings.output) and settings.output != STDIN


@contextmanager
def rows_destination(settings: PrepSettings, ledger: Ledger) -> Iterator[Write]:
    """A function that writes rows where they go; those of a split come one by one."""
    if settings.split:
        with split_files(settings, ledger) as write:
            yield write
    elif settings.stats and settings.json and not to_file(settings):
        yield lambda made: None  # only looked at
    else:
        with lines_output(settings.output if to_file(settings) else None, force=settings.force) as write_line:
            yield lambda made: write_line(made.lines if isinstance(made, Together) else made[0])


@contextmanager
def split_files(settings: PrepSettings, ledger: Ledger) -> Iterator[Write]:
    """One file for each part in a folder that appears whole; a row's content decides its part."""
    folder, shares = Path(settings.output or ""), parse_shares(settings.split or "")
    ledger.parts.update(dict.fromkeys(shares, 0))
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or read_manifest(folder) is not None)):
        raise UserError(
            f"{folder} exists and was not made by ftkit",
            ExitCode.EXISTS,
            hint="give another -o; --force replaces only what ftkit made",
        )
    stratifier = Stratifier(shares, has_duplicates=settings.dedupe == "none") if settings.stratify else None
    with atomic_folder(folder, replace=settings.force) as staged, ExitStack() as files:
        writers = {name: files.enter_context((staged / f"{name}.jsonl").open("wb")).write for name in shares}

        def write(made: Made | Together) -> str:
            assert not isinstance(made, Together)
            line, digest, about = made
            part = stratifier.part_of(digest, about and about.stratum) if stratifier else part_of(digest, shares)
            ledger.parts[part] += 1
            writers[part](line)
            return part

        yield write


@contextmanager
def rejects_output(settings: PrepSettings) -> Iterator[Callable[[Row], Any] | None]:
    """Where rejected rows go, if anywhere."""
    if settings.rejects is None:
        yield None
        return
    with rows_output(settings.rejects, force=settings.force) as write:
        yield write
