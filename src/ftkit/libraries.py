"""Libraries that take long to load, loaded quicker; and how much they may keep."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftkit.postponed_compiler import postpone_compiler

KEPT_PRIMITIVES = 256
"""Kernels that oneDNN keeps, one for every shape of a product. Its own 1,024 are half a gigabyte with packs of many lengths."""


def keep_few_primitives() -> None:
    """Before torch computes anything. Who set the variable is obeyed."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRIMITIVES))


def import_transformers() -> None:
    """Load transformers and PEFT without what these commands never use: half of the seconds before a first step.

    That is training in several processes, its losses for finding objects in pictures (which load scipy), PyTorch's compiler
    (until something compiles), and a second look through the files of all its models. Who has loaded it already keeps it.
    """
    if "transformers" in sys.modules:
        return
    import torch

    postpone_compiler()
    import transformers.utils
    from transformers.utils import import_utils

    scan = import_utils.create_import_structure_from_path
    changed = [
        (torch.distributed, "is_available", no),  # PEFT asks it too
        (transformers.utils, "is_scipy_available", no),
        (import_utils, "create_import_structure_from_path", lambda path: scan(folder_of(path))),
    ]
    before = [getattr(module, name) for module, name, _ in changed]
    for module, name, answer in changed:
        setattr(module, name, answer)
    try:
        import_utils.is_torch_distributed_available()  # its answer is kept
        import transformers.modeling_utils
        import transformers.models

        import_bitsandbytes()
        import peft  # noqa: F401
    finally:
        for (module, name, _), answer in zip(changed, before, strict=True):
            setattr(module, name, answer)


def no() -> bool:
    """To a question whether something is there."""
    return False


def folder_of(path: str | Path) -> Path:
    """The folder, of a file its own: transformers keeps what it found under the name that it was asked by."""
    return Path(path).parent if Path(path).is_file() else Path(path)


def import_bitsandbytes() -> None:
    """Load bitsandbytes, which PEFT does wherever it is installed, without PyTorch's compiler: a second less.

    bitsandbytes 0.50 hands four functions to torch.compile while it is imported. They are stand-ins for devices without
    kernels of their own; CPU and CUDA have theirs.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    import torch

    compiler = torch.compile
    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    except Exception:
        return  # who needs it meets the error itself, and says so
    finally:
        torch.compile = compiler


def as_it_is(function: Any = None, **_: Any) -> Any:
    """In place of torch.compile: the function, or a decorator that returns it."""
    return as_it_is if function is None else function
