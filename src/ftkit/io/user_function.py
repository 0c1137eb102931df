"""A function of the user's own: FILE.py:function."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.errors import ExitCode, UserError, did_you_mean


def load_function(address: str, flag: str) -> Callable[..., Any]:
    """The function at `FILE.py:name`; what cannot be loaded is a usage error."""
    file, _, name = address.rpartition(":")
    path = Path(file)
    if not file or path.suffix != ".py":
        raise UserError(f"{flag} {address}: should be FILE.py:FUNCTION", ExitCode.USAGE, hint=f"{flag} mine.py:rows")
    if not path.is_file():
        raise UserError(f"{flag} {address}: no such file", ExitCode.USAGE, hint="give the path of a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:
        raise UserError(f"{flag} {address}: {type(error).__name__}: {error}", ExitCode.USAGE) from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = f"{did_you_mean(name, known)}it has {', '.join(known) or 'none'}"
        raise UserError(f"{flag} {address}: {path} has no function '{name}'", ExitCode.USAGE, hint=hint)
    return function  # type: ignore[no-any-return]
