"""The sizes of a decoder from its config.json alone, without transformers: what the closed form needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.core.targets_by_name import ATTENTION, LAYERS, MLP
from ftkit.errors import ExitCode, UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures with RMSNorm in front of attention and of a gated MLP, the ones that the closed form describes."""
LEFT_OUT: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
}
"""What transformers takes where a config says nothing."""


@dataclass(frozen=True)
class ModelSizes:
    """Widths in elements. query: all query heads together, key: all key heads (and as many for values).

    biased: names of the linear layers with a bias. window: tokens that a layer looks back; None for all.
    """

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head: int
    mlp: int
    vocabulary: int
    is_tied: bool
    biased: tuple[str, ...]
    norms_heads: bool
    window: int | None
    context: int | None

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Width of all key heads together."""
        return self.key_heads * self.head

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block, by name."""
        h, f, q, k = self.hidden, self.mlp, self.query, self.key
        shapes = [(h, q), (h, k), (h, k), (q, h), (h, f), (h, f), (f, h)]
        return dict(zip(LAYERS, shapes, strict=True))

    @property
    def norm_weights(self) -> int:
        """Elements of a block's norms."""
        return 2 * self.hidden + (2 * self.head if self.norms_heads else 0)

    @property
    def parameters(self) -> int:
        """All elements of the model, a tied output head once."""
        block = sum(inputs * outputs for inputs, outputs in self.linear.values())
        block += sum(self.linear[name][1] for name in self.biased) + self.norm_weights
        return self.layers * block + self.hidden + self.vocabulary * self.hidden * (1 if self.is_tied else 2)


def read_sizes(raw: Mapping[str, Any], name: str) -> ModelSizes:
    """The sizes that a config.json states; exit 6 for an architecture that the closed form does not describe, exit 4 for
    sizes that are no sizes.

    Keys that a config may leave out have the defaults of transformers for its architecture.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{name}: the closed form knows {', '.join(FAMILIES)}, not {family}",
            ExitCode.ENVIRONMENT,
            hint="without --fast the model's own code is simulated",
        )
    raw = LEFT_OUT[str(family)] | dict(raw)
    hidden, heads = size(raw, "hidden_size", name), size(raw, "num_attention_heads", name)
    key_heads = optional_size(raw, "num_key_value_heads", name) or heads
    head = optional_size(raw, "head_dim", name) or hidden // heads
    if heads % key_heads or not head:
        what = f"hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {key_heads}"
        hint = (
            "give the model's own config.json: heads share the hidden size, and keys are shared by as many heads each"
        )
        raise UserError(f"{name}: config.json has {what}, which do not go together", ExitCode.MODEL, hint=hint)
    return ModelSizes(
        hidden=hidden,
        layers=size(raw, "num_hidden_layers", name),
        heads=heads,
        key_heads=key_heads,
        head=head,
        mlp=size(raw, "intermediate_size", name),
        vocabulary=size(raw, "vocab_size", name),
        is_tied=bool(raw.get("tie_word_embeddings", False)),
        biased=biased_layers(raw, str(family)),
        norms_heads=family == "qwen3",
        window=window_of(raw, str(family), name),
        context=optional_size(raw, "max_position_embeddings", name),
    )


def size(raw: Mapping[str, Any], key: str, name: str) -> int:
    """A whole number above 0 that config.json must state; exit 4 without."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = f"no {key}" if value is None else f"{str(value)[:40]!r} as {key}, which is a whole number above 0"
        raise UserError(f"{name}: config.json has {what}", ExitCode.MODEL, hint="give the model's own config.json")
    return value


def optional_size(raw: Mapping[str, Any], key: str, name: str) -> int | None:
    """A size that config.json may leave open."""
    return None if raw.get(key) is None else size(raw, key, name)


def biased_layers(raw: Mapping[str, Any], family: str) -> tuple[str, ...]:
    """Linear layers with a bias: queries, keys and values of Qwen2; where a config says so, others."""
    attention = ATTENTION if raw.get("attention_bias") else ATTENTION[:3] if family == "qwen2" else ()
    return attention + (MLP if raw.get("mlp_bias") else ())


def window_of(raw: Mapping[str, Any], family: str, name: str) -> int | None:
    """Tokens that attention looks back; Qwen's window counts only where it is switched on."""
    if family.startswith("qwen") and not raw.get("use_sliding_window"):
        return None
    return optional_size(raw, "sliding_window", name)
