"""The model that an estimate is about: read from its config.json, with what cannot be estimated refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.model_settings import held_as_stored
from ftkit.core.model_sizes import ModelSizes, read_sizes
from ftkit.core.options import flag_of
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import Base, find_base, read_config, walk
from ftkit.io.stored_quantization import kind_of_stored

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Model:
    """A model's sizes (None for an architecture that the closed form does not describe), its raw and its parsed config.

    config: of transformers; None where only the closed form is asked for, which needs no library. new_tokens: those of
    --add-tokens.
    """

    base: Base
    raw: dict[str, Any]
    config: Any
    sizes: ModelSizes | None
    new_tokens: Any = None

    @property
    def context(self) -> int | None:
        """The longest input in tokens that the model was made for; None if the config does not say."""
        if self.config is None:
            assert self.sizes is not None
            return self.sizes.context
        from ftkit.io.base_model import context_length

        return context_length(self.config)

    @property
    def widths(self) -> tuple[int, int, int]:
        """(hidden size, blocks, rows of the embeddings)."""
        if self.sizes is not None:
            return self.sizes.hidden, self.sizes.layers, self.sizes.vocabulary
        text = self.config.get_text_config()
        return text.hidden_size, text.num_hidden_layers, text.vocab_size

    @property
    def features(self) -> int:
        """Of a token's hidden states, in all layers together."""
        hidden, layers, _ = self.widths
        return hidden * layers

    @property
    def stored_dtype(self) -> str | None:
        """The format that config.json says the weights have: bf16, fp16, fp32; None if it says nothing."""
        said = next((self.raw[key] for key in ("dtype", "torch_dtype") if self.raw.get(key)), None)
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(said))

    @property
    def experts(self) -> int:
        """Experts of a layer, wherever in the config their number stands; 0 for a dense model."""
        found = [value for key, value in walk(self.raw) if key in EXPERTS]
        return max((count for count in found if isinstance(count, int) and count > 1), default=0)


def read_model(settings: EstimateSettings) -> Model:
    """The model of a folder, a config.json or a model id; nothing else of it is needed."""
    named = Path(settings.model)
    base = find_base(
        str(named.parent) if named.name == "config.json" and named.is_file() else settings.model, settings.revision
    )
    raw = read_config(base)
    if settings.fast:
        return Model(base, raw, None, read_sizes(raw, settings.model))
    config = parsed(base, raw, settings.model)
    return Model(base, raw, config, sizes_if_described(raw, settings.model), read_new_tokens(settings, base, config))


def settle_quantization(settings: EstimateSettings, model: Model) -> EstimateSettings:
    """For a base whose files hold packed weights: the settings as it is held, which nothing else can be compared with."""
    stored = model.raw.get("quantization_config")
    if not stored:
        return settings
    if not isinstance(stored, dict):
        what = f"{settings.model}: config.json has {str(stored)[:40]!r} as quantization_config, which is an object"
        raise UserError(what, ExitCode.MODEL, hint="give the model's own config.json")
    for asked in ("compare", "fit", "framework"):
        if getattr(settings, asked) not in (False, None, "ftkit"):
            what = f"{settings.model} is quantised already, so {flag_of(asked)} has nothing to choose from"
            raise UserError(what, ExitCode.USAGE, hint="give the 16-bit model that it was made from, or --gpu")
    return held_as_stored(settings, kind_of_stored(stored, settings.model), settings.model)


def read_new_tokens(settings: EstimateSettings, base: Base, config: Any) -> Any:
    """The tokens of --add-tokens; without a tokenizer beside config.json, each is a row more."""
    if settings.add_tokens is None:
        return None
    from ftkit.io.base_model import load_tokenizer
    from ftkit.io.new_tokens import add_new_tokens, appended_tokens, read_token_file

    texts, rows = read_token_file(settings.add_tokens), config.get_text_config().vocab_size
    try:
        tokenizer = load_tokenizer(base, rows)
    except UserError as error:
        console.info(f"each new token counts as a new row of the embeddings: {error.message}")
        return appended_tokens(texts, rows)
    return add_new_tokens(tokenizer, texts, settings.add_tokens)


def parsed(base: Base, raw: dict[str, Any], name: str) -> Any:
    """The config as transformers reads it, of a causal language model."""
    from ftkit.io.base_model import require_causal, transformers_config

    config = transformers_config(base)
    require_causal(raw, config, name)
    require_sizes(raw, config, name)
    return config


def require_sizes(raw: dict[str, Any], config: Any, name: str) -> None:
    """A config without its sizes would silently get those of the architecture's first model."""
    inner = raw.get("text_config") or raw
    for key in SIZES:
        if key not in inner and config.attribute_map.get(key) not in inner:
            raise UserError(
                f"{name}: config.json has no {key}", ExitCode.MODEL, hint="give the model's own config.json"
            )


def sizes_if_described(raw: dict[str, Any], name: str) -> ModelSizes | None:
    """The sizes for the closed form; None for another architecture."""
    try:
        return read_sizes(raw, name)
    except UserError as error:
        if error.exit_code == ExitCode.ENVIRONMENT:
            return None
        raise
