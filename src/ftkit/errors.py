"""Mistakes that a user can mend, and the exit codes that scripts can trust."""

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """The documented exit status of every command."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    MODEL = 4
    MEMORY = 5
    ENVIRONMENT = 6
    DIVERGED = 7
    GATE = 8
    EXISTS = 9
    IO = 74
    STOPPED = 75
    INTERRUPTED = 130
    CLOSED_PIPE = 141


class UserError(Exception):
    """A mistake that the user can mend: what is wrong (with its place), and what to type next."""

    def __init__(self, message: str, exit_code: ExitCode, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """How the error comes over from another process; the usual way calls __init__, which subclasses change."""
        return revived, (type(self), self.args, self.__dict__)


def revived(kind: type[UserError], words: tuple[Any, ...], fields: dict[str, Any]) -> UserError:
    """An error as it was in another process."""
    error = kind.__new__(kind, *words)
    error.__dict__.update(fields)
    return error


def did_you_mean(word: str, known: list[str]) -> str:
    """`did you mean 'x'? ` for the nearest known word, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'? " if near else ""


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
"""What torch says of it where it raises no error of its own kind: on the CPU, in CUDA, cuBLAS and cuDNN, on MPS."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's own error and for torch's on a GPU and on the CPU, known by name: torch may not be loaded."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
