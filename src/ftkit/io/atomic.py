"""Files and folders that appear whole or not at all: staged beside their place, flushed to disk, then renamed.

A folder gets a manifest.json last: name, bytes and sha256 of every file in it.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any

from ftkit import faults
from ftkit.errors import ExitCode, UserError

MANIFEST = "manifest.json"
BUFFER_BYTES = 1 << 18
MANIFEST_SCHEMA = "ftkit.manifest/1"
MAKE_AGAIN = "make the folder again, or copy it again from where it was made"


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """An open file that takes the name `path` when the block ends well; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    staged = staging_name(path)
    try:
        with staged.open(
            mode, buffering=BUFFER_BYTES, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else ""
        ) as file:
            yield file
            faults.point("write")
            file.flush()
            os.fsync(file.fileno())
        faults.point("rename")
        os.replace(staged, path)
        sync_folder(path.parent)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: Path, *, replace: bool = False, extra: dict[str, Any] | None = None, sums: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """A folder to fill that takes the name `path`, manifest written last, when the block ends well.

    `extra` goes into the manifest. sums: the sha256 of files whose maker knows it by the end of the block; others are
    computed. An existing `path` is an error unless `replace`; it is only removed once the
    new one is whole.
    """
    refuse_existing(path, replace=replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    staged = staging_name(path)
    staged.mkdir()
    faults.point("staged")
    try:
        yield staged
        write_manifest(staged, extra or {}, sums or {})
        publish(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, gone when the block ends; what a killed process left of one goes with its next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    staged = staging_name(path)
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def refuse_existing(path: Path, *, replace: bool) -> None:
    """Exit 9 where an output exists and may not be replaced."""
    if path.exists() and not replace:
        raise UserError(f"{path} exists", ExitCode.EXISTS, hint="give another -o, or --force to replace it")


def publish(staged: Path, path: Path) -> None:
    """Rename a whole staged folder to its name; what was there before goes away last."""
    old = None
    if path.exists():
        old = staging_name(path)
        os.replace(path, old)
    faults.point("rename")
    os.replace(staged, path)
    faults.point("renamed")
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def write_manifest(folder: Path, extra: dict[str, Any], sums: Mapping[str, str]) -> None:
    """Flush every file of the folder to disk, then list them with sizes and checksums in manifest.json."""
    listed = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        sync_file(file)
        name = file.relative_to(folder).as_posix()
        listed[name] = {"bytes": file.stat().st_size, "sha256": sums.get(name) or sha256_of_file(file)}
    text = json.dumps({"schema": MANIFEST_SCHEMA, **extra, "files": listed}, indent=1, sort_keys=True)
    faults.point("manifest")
    with (folder / MANIFEST).open("w", encoding="utf-8") as file_out:
        file_out.write(text + "\n")
        file_out.flush()
        os.fsync(file_out.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise damaged_manifest(folder)
    return manifest


def damaged_manifest(folder: Path) -> UserError:
    """The error for a manifest that cannot be relied upon."""
    return UserError(f"{folder / MANIFEST}: damaged", ExitCode.MODEL, hint=MAKE_AGAIN)


def check_manifest(folder: Path) -> None:
    """Every file that the manifest lists is there, whole and unchanged; otherwise exit 4 names the file.

    A folder without a manifest was not made by ftkit and is left to other checks.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(expected, dict) for expected in files.values()):
        raise damaged_manifest(folder)
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / MANIFEST}: path {name!r} leaves the folder", ExitCode.MODEL, hint=MAKE_AGAIN)
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing, though the manifest lists it", ExitCode.MODEL, hint=MAKE_AGAIN)
        if file.stat().st_size != expected.get("bytes"):
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, should have {expected.get('bytes')} (cut off?)",
                ExitCode.MODEL,
                hint=MAKE_AGAIN,
            )
        if sha256_of_file(file) != expected.get("sha256"):
            raise UserError(f"{file}: damaged (its sha256 is not the manifest's)", ExitCode.MODEL, hint=MAKE_AGAIN)


def sha256_of_file(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging_name(path: Path) -> Path:
    """`.tmp-<name>-<host>-<pid>-<random>` beside `path`, on the same file system."""
    return path.with_name(f".tmp-{path.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def is_staged(path: Path) -> bool:
    """True for what is being made, or was when its process died."""
    return path.name.startswith(".tmp-")


def remove_leftovers(folder: Path, name: str = "*", *, all_hosts: bool = False) -> None:
    """Remove what processes of this host left staged, for this name or for all, when they died.

    all_hosts: whoever they were, and alive or not: where a lock says that nobody else works in the folder.
    """
    host = "*" if all_hosts else escape(socket.gethostname())
    for leftover in folder.glob(f".tmp-{name if name == '*' else escape(name)}-{host}-*-*"):
        pid = leftover.name.rsplit("-", 2)[1]
        if all_hosts or (pid.isdigit() and not is_alive(int(pid))):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """True if a process of that number runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    sync_file(path)
