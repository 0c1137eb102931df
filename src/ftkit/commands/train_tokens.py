"""Rows of `ftkit train` as ids: encoded, or read where a run before has encoded the same."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ftkit import __version__, console
from ftkit.commands.train_rows import Data, encode
from ftkit.core.encoding import Encoder
from ftkit.core.example_store import ExampleStore
from ftkit.core.examples import Ledger
from ftkit.core.train_settings import TrainSettings
from ftkit.io.run_folder import RUNS, RunFolder
from ftkit.io.token_file import TOKENS, read_tokens, write_tokens

MANY = 500_000
"""Tokens that are worth a file: some seconds of encoding."""


@dataclass(frozen=True)
class Encoded:
    """All examples of a data set, the row that each is of, and what was lost. key: of what; None: not to be kept."""

    examples: ExampleStore
    origin: list[int]
    ledger: Ledger
    key: str | None = None


def encode_or_read(settings: TrainSettings, data: Data, encoder: Encoder) -> Encoded:
    """The rows' examples; those of a run beside this one where rows, tokenizer, template and lengths are the same."""
    key = key_of(settings, data, encoder)
    for path in files_of_runs(settings) if key else ():
        if (found := read_tokens(path, str(key))) is not None:
            console.info(f"the ids of {len(data.rows):,} rows are those of {path.parent}")
            return from_tensors(*found, key=key)
    return Encoded(*encode(settings, encoder, data.rows, data.places), key=key)


def keep(encoded: Encoded, folder: RunFolder) -> None:
    """Write many ids into the run's folder; where that fails, the run goes on without."""
    if encoded.key is None or encoded.ledger.tokens < MANY or (folder.path / TOKENS).exists():
        return
    try:
        write_tokens(folder.path / TOKENS, encoded.key, *to_tensors(encoded))
    except OSError as error:
        console.warn(f"{folder.path / TOKENS}: {error.strerror}; the next run encodes its rows again")


def files_of_runs(settings: TrainSettings) -> Iterator[Path]:
    """Where ids may lie: in --run, and in the runs beside it, newest first."""
    run = Path(settings.run) if settings.run else None
    if run is not None:
        yield run / TOKENS
    beside = RUNS if run is None else run.parent
    yield from sorted(beside.glob(f"*/{TOKENS}"), reverse=True)


def key_of(settings: TrainSettings, data: Data, encoder: Encoder) -> str | None:
    """sha256 of all that decides the ids; None for a tokenizer that cannot be written down."""
    tokenizer = encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    facts = {
        "ftkit": __version__,
        "transformers": transformers.__version__,
        "rows": data.sha256,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template": tokenizer.chat_template,
        "specials": [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)],
        "template": data.template and data.template.fingerprint,
        "classes": encoder.classes,
        "turns": encoder.turns,
        "length": [settings.max_length, settings.overlength],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def to_tensors(encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """ids int32 and counted bool, all examples in a row; lengths and origin int64, weights float64, one of each example."""
    store = encoded.examples
    tensors = {
        "ids": tensor_of(store.ids),
        "counted": tensor_of(store.counted).bool(),
        "lengths": torch.diff(tensor_of(store.ends), prepend=torch.zeros(1, dtype=torch.int64)),
        "origin": torch.tensor(encoded.origin),
        "weights": tensor_of(store.weights),
    }
    return tensors, asdict(encoded.ledger)


def tensor_of(values: Any) -> Tensor:
    """Any array of numbers as a tensor of their type."""
    return torch.tensor(np.asarray(values))


def from_tensors(tensors: dict[str, Tensor], ledger: dict[str, Any], key: str | None) -> Encoded:
    """What `to_tensors` was given; the ids stay where they are, in memory that is mapped to their file."""
    names = ("ids", "counted", "weights")
    ids, counted, weights = (tensors[name].numpy() for name in names)
    ends = array("q", accumulate(tensors["lengths"].tolist()))
    return Encoded(ExampleStore.of(ids, counted, ends, weights), tensors["origin"].tolist(), Ledger(**ledger), key)
