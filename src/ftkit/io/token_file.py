"""Ids of a run's rows in its folder, so that the same rows are encoded once: tokens.safetensors."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ftkit.io.atomic import atomic_file
from ftkit.io.tensors import bytes_of

TOKENS = "tokens.safetensors"


def write_tokens(path: Path, key: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Whole or not at all. key: what the ids were made of; facts: anything JSON can hold."""
    from safetensors.torch import save

    noted = {"key": key, "sha256": checksum(tensors), "facts": facts}
    with atomic_file(path, "wb") as file:  # one entry: several have no order, and the same ids should be the same bytes
        file.write(save(tensors, metadata={"ftkit": json.dumps(noted)}))


def read_tokens(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts) of a file with this key; None of any other, and of one that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            noted = json.loads((file.metadata() or {})["ftkit"])
            if noted["key"] != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if checksum(tensors) != noted["sha256"]:
                return None
            return tensors, noted["facts"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 of all bytes, in the order of names, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()
