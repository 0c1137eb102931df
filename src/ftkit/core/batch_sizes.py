"""How many rows or tokens one forward pass takes, as numbers alone: no torch is loaded for them."""

AUTO_TOKENS = 4096
"""Tokens of a micro-batch that `--micro-tokens auto` and `--micro-batch auto` aim at, pads counted."""
CHUNK_LOGITS = 2**25
"""Logits of a chunk of the loss: 128 MiB in float32, 1024 positions of 32,000 tokens."""
SMALLEST_CHUNK = 256
"""Positions of a chunk, however large the vocabulary is: fewer would make thin matrix products."""


def auto_micro_batch(longest: int, batch: int) -> int:
    """Rows per forward pass that keep a micro-batch of the longest rows near AUTO_TOKENS."""
    return max(1, min(batch, AUTO_TOKENS // max(1, longest)))


def auto_micro_tokens(longest: int, rows: int | None) -> int:
    """Tokens of a pack: AUTO_TOKENS, or what `rows` of the longest take where a number of rows was asked for."""
    return max(AUTO_TOKENS, longest) if rows is None else rows * longest


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimizer steps of one pass over the rows."""
    return -(-rows // batch)
