"""Libraries that take long to load, loaded quicker; and how much they may keep."""

import os
import sys
from importlib.util import find_spec
from typing import Any


KEPT_PRIMITIVES = 256
"""Kernels that oneDNN keeps, one for every shape of a product. Its own 1,024 are half a gigabyte with packs of many lengths."""


def keep_few_primitives() -> None:
    """Before torch computes anything. Who set the variable is obeyed."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRIMITIVES))


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
