"""The loss of saved adapters on rows that nobody trained: python bench/train_loss.py MODEL ROWS.json ADAPTER...

Plain transformers and PEFT in float32, one row after another, so that no program's own way of computing a loss counts.
ROWS.json: [[ids, first trained place], ...]. Prints a JSON list of nats per trained token: of the model without an
adapter, then of each adapter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def mean_loss(model: Any, rows: list[tuple[list[int], int]]) -> float:
    """Nats per trained token."""
    nats, tokens = 0.0, 0
    for ids, first in rows:
        labels = torch.tensor(ids[first:])
        logits = model(input_ids=torch.tensor([ids]), logits_to_keep=len(labels) + 1).logits[0, :-1]
        nats += float(F.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    return nats / tokens


def main(folder: str, rows_file: str, *adapters: str) -> None:
    """Print the losses."""
    rows = json.loads(Path(rows_file).read_text(encoding="utf-8"))
    losses = []
    for adapter in (None, *adapters):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses.append(mean_loss(PeftModel.from_pretrained(model, adapter) if adapter else model, rows))
    sys.stdout.write(json.dumps(losses) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
