"""`ftkit prep` as a shell sees it, in this process: without the time to start Python."""

import io
import json
import sys
from dataclasses import dataclass

import pytest

from ftkit.cli import main


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def rows(self):
        return rows_of(self.stdout)


class Piped(io.TextIOWrapper):
    """Bytes in place of stdin or stdout."""

    def __init__(self, content=b""):
        self.bytes = io.BytesIO(content)
        super().__init__(self.bytes, encoding="utf-8", write_through=True)


def run_prep(monkeypatch, folder, arguments, stdin):
    """What `ftkit prep ...` in a folder prints and ends with."""
    out, err = Piped(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdin", Piped(stdin.encode() if isinstance(stdin, str) else stdin))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as end:
            main(["prep", *map(str, arguments)])
    return Result(end.value.code, out.bytes.getvalue().decode(), err.getvalue())


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(text):
    return [json.loads(line) for line in text.split("\n")[:-1]]
