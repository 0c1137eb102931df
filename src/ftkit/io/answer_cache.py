"""Answers kept in a file as they come, so that an interrupted evaluation goes on where it stopped."""

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from ftkit import console
from ftkit.errors import ExitCode, UserError

SCHEMA = "ftkit.cache/1"


class AnswerCache:
    """Values by key: one line of JSON each, appended and flushed to disk together. Without a path nothing is kept.

    A last line that was cut off when the process died is taken out; any other damage is a data error.
    """

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self._known: dict[str, Any] = {}
        if self.path and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._known.get(key)

    def keep(self, items: Iterable[tuple[str, Any]]) -> None:
        """Remember these, on disk when this returns."""
        added = dict(items)
        self._known |= added
        if self.path is None or not added:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(orjson.dumps([SCHEMA, key, value]) + b"\n" for key, value in added.items())
        with self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                schema, key, value = orjson.loads(line)
                is_ours = schema == SCHEMA and isinstance(key, str)
            except (ValueError, TypeError):
                is_ours = False
            if not is_ours:
                hint = "give --cache a file of its own, or remove this one"
                raise UserError(f"{path}:{number}: not a line of ftkit's cache", ExitCode.DATA, hint=hint)
            self._known[key] = value
        if whole < len(content):
            console.info(f"{path}: its last line was cut off, and is left out")
            with path.open("r+b") as file:
                file.truncate(whole)


def key_of(*facts: Any) -> str:
    """What identifies a value: a hash of all that it depends on."""
    return sha256(orjson.dumps(facts)).hexdigest()
