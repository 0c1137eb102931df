"""Base models: find one by name, refuse what is unsafe or damaged before it is opened, load it and its tokenizer."""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.errors import ExitCode, UserError
from ftkit.io.shards import read_layout

BUILTIN = "builtin:tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
UNSAFE_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines")


@dataclass(frozen=True)
class Base:
    """A base model: its name as typed, and where it is (an absolute folder, or a Hugging Face id)."""

    name: str
    location: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, for a model on disk."""
        return Path(self.location) if Path(self.location).is_absolute() else None

    @property
    def short_name(self) -> str:
        """A name that fits into a file name."""
        return re.sub(r"[^A-Za-z0-9.-]+", "-", self.name.removeprefix("builtin:").rstrip("/").split("/")[-1]) or "model"


def find_base(name: str, revision: str | None = None) -> Base:
    """The base model that a user named; a path that does not exist or cannot be a model is exit 4."""
    if name == BUILTIN:
        return Base(name, str(files("ftkit") / "models" / "tiny"), None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        raise UserError(f"{name}: GGUF is for llama.cpp, it cannot be trained", ExitCode.MODEL, hint="give the safetensors model it was made from")
    if path.is_dir():
        return Base(name, str(path.resolve()), None)
    if path.is_file():
        hint = f"give the folder: {path.parent}"
        raise UserError(f"{name}: a file, not a model folder", ExitCode.MODEL, hint=hint)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such model folder", ExitCode.MODEL, hint=nearest_folder(path))
    return Base(name, name, revision)


def nearest_folder(path: Path) -> str:
    """A hint with the most similar folder beside the one that was named."""
    from difflib import get_close_matches

    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean '{path.parent / near[0]}'?" if near else f"give a folder, a Hugging Face id, or {BUILTIN}"


def say_default(name: str) -> None:
    """One line where no model was named: which one is used, and what to pass for another."""
    if name == BUILTIN:
        console.info(f"base: {BUILTIN}, the small demonstration model; for another: --model Qwen/Qwen3-0.6B, or a folder")


def read_config(base: Base) -> dict[str, Any]:
    """config.json as a dict, refused where it asks for code of its own or is no language model."""
    path = config_path(base)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{base.name}: config.json is not JSON", ExitCode.MODEL) from None
    if not isinstance(config, dict):
        raise UserError(f"{base.name}: config.json holds no settings", ExitCode.MODEL)
    refuse_code(config, base.name)
    return config


def config_path(base: Base) -> Path:
    """Where config.json lies, fetched into the cache for a Hugging Face id."""
    if base.folder is None:
        return fetch_config(base)
    path = base.folder / "config.json"
    if path.is_file():
        return path
    if (base.folder / "adapter_config.json").is_file():
        raise UserError(f"{base.name}: an adapter, not a base model", ExitCode.MODEL, hint=f"ftkit chat {base.name} talks to it; --model takes its base")
    raise UserError(f"{base.name}: has no config.json, so it is no model folder", ExitCode.MODEL)


def fetch_config(base: Base) -> Path:
    """config.json of a Hugging Face id; what keeps it from us is told in one line."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        with console.quiet_libraries():
            return Path(hf_hub_download(base.location, "config.json", revision=base.revision))
    except GatedRepoError:
        hint = f"accept its terms on https://huggingface.co/{base.location}, then: hf auth login"
        raise UserError(f"{base.name}: its owner asks for your consent first", ExitCode.MODEL, hint=hint) from None
    except RevisionNotFoundError:
        raise UserError(f"{base.name}: has no revision {base.revision}", ExitCode.MODEL) from None
    except RepositoryNotFoundError:
        raise UserError(f"{base.name}: not on Hugging Face, and no folder here", ExitCode.MODEL, hint="check the name; for a private one: hf auth login") from None
    except (LocalEntryNotFoundError, OSError, ValueError):
        hint = "give a folder, or --model builtin:tiny; online, `hf download` fetches a model into the cache"
        raise UserError(f"{base.name}: no folder here, not in the cache, and Hugging Face cannot be reached", ExitCode.MODEL, hint=hint) from None


def refuse_code(config: Any, name: str) -> None:
    """Keys that make a library run code from the model's folder, or smuggle in a kernel, at any depth."""
    for key, value in walk(config):
        if key in UNSAFE_KEYS and value:
            raise UserError(
                f"{name}: config.json has '{key}', which runs code that came with the model", ExitCode.MODEL,
                hint="ftkit runs architectures of transformers only; look for a version of the model without it",
            )  # fmt: skip


def walk(value: Any) -> list[tuple[str, Any]]:
    """All (key, value) pairs in nested dicts and lists."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in [(key, inner), *walk(inner)]]
    if isinstance(value, list):
        return [pair for inner in value for pair in walk(inner)]
    return []


def check_base(base: Base) -> Any:
    """Everything that can be known before weights are loaded; returns the transformers config.

    Refuses (exit 4) code in the config, architectures that do not generate text, damaged or missing weights.
    """
    raw = read_config(base)
    config = transformers_config(base)
    require_causal(raw, config, base.name)
    if base.folder is not None:
        read_layout(base.folder)
    return config


def transformers_config(base: Base) -> Any:
    """The config as transformers reads it."""
    from transformers import AutoConfig

    try:
        with console.quiet_libraries():
            return AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{base.name}: transformers cannot read its config.json: {reason}", ExitCode.MODEL) from None


def require_causal(raw: dict[str, Any], config: Any, name: str) -> None:
    """Only decoders with a language-model head can be trained to write."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named = raw.get("architectures") or []
    known = CAUSAL.get(config.model_type)
    heads = {known} if isinstance(known, str) else set(known or ())
    if not heads or (named and not set(named) & heads):
        what = named[0] if named else config.model_type
        raise UserError(f"{name}: {what} does not generate text", ExitCode.MODEL, hint="give a causal language model (…ForCausalLM, …LMHeadModel)")


def load_tokenizer(base_or_folder: Base | Path, vocabulary: int | None = None) -> Any:
    """The tokenizer; without an end-of-text token, or with more ids than the model has rows, it is refused."""
    from transformers import AutoTokenizer

    location = str(base_or_folder) if isinstance(base_or_folder, Path) else base_or_folder.location
    revision = None if isinstance(base_or_folder, Path) else base_or_folder.revision
    try:
        with console.quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise UserError(f"{location}: no tokenizer can be loaded: {reason}", ExitCode.MODEL) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{location}: the tokenizer has no end-of-text token, answers could never stop", ExitCode.MODEL,
                        hint='set "eos_token" in tokenizer_config.json')  # fmt: skip
    highest = max(tokenizer.get_vocab().values())
    if vocabulary is not None and highest >= vocabulary:
        raise UserError(f"{location}: the tokenizer has ids up to {highest}, the model has {vocabulary} rows", ExitCode.MODEL)
    return tokenizer


def load_weights(base: Base, *, dtype: Any, device: str, quantization: Any = None) -> Any:
    """The model in evaluation mode, its parameters frozen, in `dtype` on `device`; quantised where asked."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "revision": base.revision, "trust_remote_code": False, "use_safetensors": True}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        with console.quiet_libraries():
            model = AutoModelForCausalLM.from_pretrained(base.location, **options)
            model = model if quantization is not None else model.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error).lower():
            raise UserError("out of memory while loading the model", ExitCode.MEMORY, hint="try --qlora, or ftkit estimate-memory") from None
        reason = (str(error).strip().splitlines() or ["?"])[0][:300]
        raise UserError(f"{base.name}: cannot be loaded: {reason}", ExitCode.MODEL) from None
    model.requires_grad_(False)
    return model.eval()


def config_sha256(base: Base) -> str:
    """sha256 of config.json, in hex: the base's identity beside its name."""
    return sha256(config_path(base).read_bytes()).hexdigest()


def context_length(config: Any) -> int | None:
    """The longest input in tokens that the model was made for; None if the config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def new_weights(config: Any, *, dtype: Any, device: str) -> Any:
    """A model with random weights from torch's present seed."""
    from transformers import AutoModelForCausalLM

    with console.quiet_libraries():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).to(device)
