"""`hf:org/name[/config][:split]`: data sets of the hub, or folders laid out like one, read through `datasets`."""

import os
from collections.abc import Iterator
from typing import Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.tables import Record

DEFAULT_SPLIT = "train"


def read_hub(source: str) -> tuple[Iterator[Record], tuple[str, ...]]:
    """(rows numbered from 1, notes). Rows come as they are read; nothing but this data set is downloaded."""
    name, config, split = parse(source)
    data, notes = load(source, name, config, split)
    return number_rows(data, source, is_local=os.path.isdir(name)), notes


def parse(source: str) -> tuple[str, str | None, str | None]:
    """(folder or id, config, split) of `hf:org/name/config:split`."""
    address = source.removeprefix("hf:")
    folder, _, split = address.rpartition(":") if ":" in address else (address, "", "")
    if not folder:
        raise UserError(f"{source}: no data set named", ExitCode.USAGE, hint="for example hf:openai/gsm8k/main:train")
    if os.path.isdir(folder) or folder.startswith((".", "/", "~")):
        return os.path.expanduser(folder), None, split or None
    parts = folder.split("/")
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None, split or None


def load(source: str, name: str, config: str | None, split: str | None) -> tuple[Any, tuple[str, ...]]:
    """The streamed split; the train split (or the only one) if none is named."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is told once, by us
    revision = None if os.path.isdir(name) else newest_commit(name)
    notes = (f"{source}: commit {revision}",) if revision else ()
    try:
        found = datasets.load_dataset(name, config, streaming=True, revision=revision)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{source}: {first_line(error)}", ExitCode.DATA, hint="hf:org/name, hf:org/name/config:split or hf:./folder"
        ) from None
    except Exception as error:  # what a network or a hub may raise has no common class
        raise not_read(error, source, "", is_local=os.path.isdir(name)) from None
    wanted = split or (DEFAULT_SPLIT if DEFAULT_SPLIT in found or len(found) > 1 else next(iter(found)))
    if wanted not in found:
        hint = f"splits: {', '.join(found)}; for example {source.removesuffix(f':{split}')}:{next(iter(found))}"
        raise UserError(f"{source}: no split '{wanted}'", ExitCode.DATA, hint=hint)
    return found[wanted], notes


def newest_commit(name: str) -> str | None:
    """The commit that the data set is at now, so that all its files are of one state; None where the hub is away."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha
    except Exception:  # offline: `load` says what is wrong, or finds it in the cache
        return None


def number_rows(data: Any, source: str, *, is_local: bool) -> Iterator[Record]:
    """Rows with classes written as their names."""
    named = {key: kind for key, kind in (data.features or {}).items() if type(kind).__name__ == "ClassLabel"}
    number, rows = 0, iter(data)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as error:  # of the file's format, or of the network on the way to it
            raise not_read(error, source, f" behind row {number:,}", is_local=is_local) from None
        number += 1
        for key, kind in named.items():
            if isinstance(row.get(key), int) and row[key] >= 0:
                row[key] = kind.int2str(row[key])
        yield Record(number, row)
    if number == 0:
        raise UserError(f"{source}: 0 rows", ExitCode.DATA, hint="the split is empty")


def not_read(error: Exception, source: str, place: str, *, is_local: bool) -> UserError:
    """What an exception of `datasets` means: files that are no data, or a network that is not there."""
    if is_local or isinstance(error, ValueError):  # Arrow's own errors are ValueErrors, too
        message, code, hint = "damaged", ExitCode.DATA, "get its files again, or give the good ones by their names"
    else:
        message, code, hint = "not read", ExitCode.ENVIRONMENT, "is the network there? give a file otherwise"
    return UserError(f"{source}: {message}{place}: {first_line(error)}", code, hint=hint)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
