"""How many rows or tokens one forward pass takes, as numbers alone: no torch is loaded for them."""

AUTO_TOKENS = 4096
"""Tokens of a micro-batch that `--micro-tokens auto` and `--micro-batch auto` aim at, pads counted."""
MOST_AUTO_TOKENS, PACK_FEATURES = 8192, 2**25
"""A small model's packs have up to twice as many, so that starts that rows share are computed in fewer packs: as long as its
hidden states have no more features in all layers together (8 layers of 512, which keep 1 GB for 4,096 tokens more)."""
CHUNK_LOGITS = 2**25
"""Logits of a chunk of the loss: 128 MiB in float32, 1024 positions of 32,000 tokens."""
SMALLEST_CHUNK = 256
"""Positions of a chunk, however large the vocabulary is: fewer would make thin matrix products."""


def auto_micro_batch(longest: int, batch: int) -> int:
    """Rows per forward pass that keep a micro-batch of the longest rows near AUTO_TOKENS."""
    return max(1, min(batch, AUTO_TOKENS // max(1, longest)))


def auto_micro_tokens(longest: int, rows: int | None, features: int) -> int:
    """Tokens of a pack: AUTO_TOKENS, or more for a small model, or what `rows` of the longest take where a number was asked for.

    features: of a token's hidden states, in all layers together.
    """
    if rows is not None:
        return rows * longest
    return max(AUTO_TOKENS, min(MOST_AUTO_TOKENS, PACK_FEATURES // max(1, features)), longest)


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimizer steps of one pass over the rows."""
    return -(-rows // batch)
