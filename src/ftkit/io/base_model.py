"""Base models: find one by name, refuse what is unsafe or damaged before it is opened, load it and its tokenizer."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.errors import ExitCode, UserError
from ftkit.io.class_head import CLASSES, ClassHead, classifies, require_head_for_classes
from ftkit.io.shards import TensorPlace, read_layout, weight_files
from ftkit.io.stored_quantization import kind_of_stored, stored_quantization

BUILTIN = "builtin:tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
UNSAFE_KEYS = (
    "auto_map", "trust_remote_code", "custom_pipelines", "transformers_weights",
    "_attn_implementation_internal", "_experts_implementation_internal",
)  # fmt: skip
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Harmless as names of transformers' own kernels; `org/name` is a kernel that would be fetched and run."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
NO_GGUF = "GGUF is for llama.cpp, it cannot be trained"
INSTEAD_OF_GGUF = "give the safetensors model that it was made from"
PACKED = ("U8", "I8")
"""Formats in files of weights that bitsandbytes packed: their shape says nothing of the layer's."""
SAMPLED_BYTES = 4096
"""Of every tensor, in `weights_sha256`."""


@dataclass(frozen=True)
class Base:
    """A base model: its name as typed, and where it is (an absolute folder, or a Hugging Face id at a commit)."""

    name: str
    location: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, for a model on disk."""
        return Path(self.location) if Path(self.location).is_absolute() else None

    @property
    def public_name(self) -> str:
        """What may be published of where it is: a folder's own name, not its place on this machine."""
        return Path(self.location).name if self.folder and not self.name.startswith("builtin:") else self.name

    @property
    def short_name(self) -> str:
        """A name that fits into a file name."""
        return re.sub(r"[^A-Za-z0-9.-]+", "-", self.name.removeprefix("builtin:").rstrip("/").split("/")[-1]) or "model"


def find_base(name: str, revision: str | None = None) -> Base:
    """The base model that a user named; a path that does not exist or cannot be a model is exit 4.

    A Hugging Face id is pinned to the commit that `revision` means now, so that all its files are of one state.
    """
    if name == BUILTIN:
        return Base(name, str(Path(str(files("ftkit"))).resolve() / "models" / "tiny"), None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        raise UserError(f"{name}: {NO_GGUF}", ExitCode.MODEL, hint=INSTEAD_OF_GGUF)
    if path.is_dir():
        return Base(name, str(path.resolve()), None)
    if path.is_file():
        hint = f"give the folder: {path.parent}"
        raise UserError(f"{name}: a file, not a model folder", ExitCode.MODEL, hint=hint)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such model folder", ExitCode.MODEL, hint=nearest_folder(path))
    return pinned(Base(name, name, revision))


def pinned(base: Base) -> Base:
    """A Hugging Face id with its commit: the cache keeps each commit's files in a folder of its name."""
    commit = fetch_config(base).parent.name
    return replace(base, revision=commit) if COMMIT.fullmatch(commit) else base


def nearest_folder(path: Path) -> str:
    """A hint with the most similar folder beside the one that was named."""
    from difflib import get_close_matches

    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean '{path.parent / near[0]}'?" if near else f"give a folder, a Hugging Face id, or {BUILTIN}"


def say_default(name: str) -> None:
    """One line where no model was named: which one is used, and what to pass for another."""
    if name == BUILTIN:
        console.info(
            f"base: {BUILTIN}, the small demonstration model; for another: --model Qwen/Qwen3-0.6B, or a folder"
        )


def read_config(base: Base) -> dict[str, Any]:
    """config.json as a dict, refused where it asks for code of its own or is no language model."""
    path = config_path(base)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(
            f"{base.name}: config.json is not JSON (damaged?)", ExitCode.MODEL, hint="download the model again"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{base.name}: config.json holds no settings", ExitCode.MODEL, hint="download the model again")
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
        raise UserError(
            f"{base.name}: an adapter, not a base model",
            ExitCode.MODEL,
            hint=f"ftkit chat {base.name} talks to it; --model takes its base",
        )
    if any(base.folder.glob("*.gguf")):
        raise UserError(f"{base.name}: {NO_GGUF}", ExitCode.MODEL, hint=INSTEAD_OF_GGUF)
    hint = f"give a folder with config.json and weights, a Hugging Face id, or {BUILTIN}"
    raise UserError(f"{base.name}: has no config.json, so it is no model folder", ExitCode.MODEL, hint=hint)


def fetch_config(base: Base) -> Path:
    """config.json of a Hugging Face id; what keeps it from us is told in one line."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the library below
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where: dict[str, Any] = {"repo_id": base.location, "filename": "config.json", "revision": base.revision}
    try:
        with console.quiet_libraries():
            if not isinstance(try_to_load_from_cache(**where), str):
                get_hf_file_metadata(hf_hub_url(**where))  # without a network, a download tries for half a minute
            return Path(hf_hub_download(**where))
    except GatedRepoError:
        hint = f"accept its terms on https://huggingface.co/{base.location}, then: hf auth login"
        raise UserError(f"{base.name}: its owner asks for your consent first", ExitCode.MODEL, hint=hint) from None
    except RevisionNotFoundError:
        hint = "leave out --revision for the newest"
        raise UserError(f"{base.name}: has no revision {base.revision}", ExitCode.MODEL, hint=hint) from None
    except RepositoryNotFoundError:
        fault, hint = "not on Hugging Face, and no folder here", "check the name; for a private one: hf auth login"
    except (LocalEntryNotFoundError, OSError, ValueError, HTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            hint = "GGUF and adapters have none: give the model that they were made from"
            raise UserError(f"{base.name}: has no config.json", ExitCode.MODEL, hint=hint) from None
        fault = "no folder here, not in the cache, and Hugging Face cannot be reached"
        hint = f"give a folder, or --model {BUILTIN}; online, `hf download` fetches a model into the cache"
    near = nearest_folder(Path(base.name))  # a path with a slip of the finger looks like an id, too
    raise UserError(f"{base.name}: {fault}", ExitCode.MODEL, hint=near if "did you mean" in near else hint)


def local_files(base: Base, *, weights: bool) -> Path:
    """The folder with a base's files; those of a Hugging Face id come from the cache, and into it what it lacks.

    What is in the cache is taken without asking, and libraries are only given this folder: left to fetch by themselves,
    each optional file that is not there costs them half a minute where there is no network.
    """
    if base.folder is not None:
        return base.folder
    from huggingface_hub import snapshot_download

    here = config_path(base).parent
    if is_there(here, weights=weights):
        return here
    wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        with console.quiet_libraries():
            found = snapshot_download(
                base.location, revision=base.revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
            )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        hint = f"hf download {base.location} fetches it into the cache"
        raise UserError(f"{base.name}: cannot be fetched: {reason}", ExitCode.MODEL, hint=hint) from None
    return Path(found)


def is_there(folder: Path, *, weights: bool) -> bool:
    """True if a folder of the cache holds the weights that its index lists, or else a tokenizer."""
    if not weights:
        return any((folder / file).is_file() for file in TOKENIZER_FILES)
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def refuse_code(config: Any, name: str) -> None:
    """Keys, at any depth, that make a library run code or open files of the model's choice."""
    for key, value in walk(config):
        fetches_kernel = key in KERNEL_KEYS and "/" in str(value)
        if (key in UNSAFE_KEYS and value) or fetches_kernel:
            raise UserError(
                f"{name}: config.json sets '{key}', which makes libraries run code or open files of the model's choice",
                ExitCode.MODEL,
                hint="ftkit runs architectures of transformers only; look for a version of the model without it",
            )


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs in nested dicts and lists."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield from value.items()
    for part in inner:
        yield from walk(part)


def check_base(base: Base, *, for_classes: bool = False, any_head: bool = False) -> Any:
    """Everything that can be known before weights are loaded; returns the transformers config.

    Refuses (exit 4) code in the config, architectures that do not generate text (for_classes: that cannot get a head for
    classes; any_head: that have neither), damaged or missing weights.
    """
    raw = read_config(base)
    config = transformers_config(base)
    if for_classes:
        require_head_for_classes(config, base.name)
    elif any_head and classifies(config):
        config.problem_type = CLASSES
    else:
        require_causal(raw, config, base.name)
    if base.folder is not None:
        read_layout(base.folder)
    return config


def transformers_config(base: Base) -> Any:
    """The config as transformers reads it."""
    from transformers import AutoConfig

    try:
        with console.quiet_libraries():
            return AutoConfig.from_pretrained(config_path(base).parent, trust_remote_code=False)
    except Exception as error:  # each architecture checks its settings in its own way, down to a division by zero
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = (lines[-1] if lines[0].endswith(":") else lines[0]).strip()[:200]  # the cause stands below its heading
        raise UserError(
            f"{base.name}: transformers cannot read its config.json: {reason}",
            ExitCode.MODEL,
            hint="give the model's own config.json; a new architecture needs a new version of transformers",
        ) from None


def require_causal(raw: dict[str, Any], config: Any, name: str) -> None:
    """Only decoders with a language-model head can be trained to write."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    named = raw.get("architectures")
    named = [str(architecture) for architecture in named] if isinstance(named, list) else []
    known = CAUSAL.get(config.model_type)
    heads = {known} if isinstance(known, str) else set(known or ())
    looks_both_ways = config.model_type in MASKED and not getattr(config, "is_decoder", False)  # BERT and its kin
    if not heads or looks_both_ways or (named and not set(named) & heads):
        what = named[0] if named else config.model_type
        raise UserError(
            f"{name}: {what} does not generate text",
            ExitCode.MODEL,
            hint="give a causal language model (…ForCausalLM, …LMHeadModel)",
        )


def load_tokenizer(base_or_folder: Base | Path, vocabulary: int | None = None, *, answers: bool = True) -> Any:
    """The tokenizer; with more ids than the model has rows, or (answers) without an end-of-text token, it is refused."""
    from transformers import AutoTokenizer

    folder = base_or_folder if isinstance(base_or_folder, Path) else local_files(base_or_folder, weights=False)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        hint = f"it should have one of {', '.join(TOKENIZER_FILES)}"
        raise UserError(f"{folder}: has no tokenizer", ExitCode.MODEL, hint=hint)
    try:
        with console.quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        reason = (str(error).strip().splitlines() or ["?"])[0].rstrip(":")[:200]
        raise UserError(
            f"{folder}: its tokenizer cannot be loaded: {reason}", ExitCode.MODEL, hint="download the model again"
        ) from None
    if answers and tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token, answers could never stop", ExitCode.MODEL,
                        hint='set "eos_token" in tokenizer_config.json')  # fmt: skip
    highest = max(tokenizer.get_vocab().values(), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {highest}, the model has {vocabulary} rows",
            ExitCode.MODEL,
            hint="give the tokenizer that belongs to the model",
        )
    return tokenizer


def load_weights(
    base: Base, *, dtype: Any, device: str, quantization: Any = None, config: Any = None, new_head: bool = False
) -> Any:
    """The model in evaluation mode, its parameters frozen, in `dtype` on `device`; quantised where asked.

    config: of a model with a head for classes, which is not quantised. new_head: the files are those of its body, the
    head gets random weights from torch's present seed.
    """
    from safetensors import SafetensorError

    from ftkit.io.quantization import quantization_config

    folder = local_files(base, weights=True)
    read_layout(folder)
    own = config if config is not None else transformers_config(base)
    if stored := stored_quantization(own):  # it decides, whatever is asked
        kind_of_stored(stored, base.name)
        quantization = quantization_config("", dtype, stored=stored)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if config is not None:
        options["config"] = config
    if quantization is not None:
        if config is not None:
            quantization.llm_int8_skip_modules = [*(quantization.llm_int8_skip_modules or ()), *head_of(config).names]
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    if stored:
        own.quantization_config = options.pop("quantization_config").to_dict()
        options["config"] = own
    try:
        with console.quiet_libraries():
            model, found = model_class(config).from_pretrained(folder, output_loading_info=True, **options)
            model = model if quantization is not None else model.to(device)
    except ImportError as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:300]
        raise UserError(
            f"{base.name}: cannot be loaded here: {reason}",
            ExitCode.ENVIRONMENT,
            hint="pip install ftkit brings all libraries",
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if "out of memory" in str(error).lower():
            raise UserError(
                "out of memory while loading the model", ExitCode.MEMORY, hint="try --qlora, or ftkit estimate-memory"
            ) from None
        reason = (str(error).strip().splitlines() or ["?"])[0][:300]
        raise UserError(
            f"{base.name}: cannot be loaded: {reason}", ExitCode.MODEL, hint="download the model again"
        ) from None
    if new_head:
        head = ClassHead(model)
        found = {"missing_keys": [key for key in found["missing_keys"] if not head.holds(key)], "unexpected_keys": []}
    require_all_found(base, found)
    model.requires_grad_(False)
    return model.eval()


def model_class(config: Any) -> Any:
    """Of transformers: for a config that asks for classes a head for them, else one for words."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if config is not None and classifies(config) else AutoModelForCausalLM


def head_of(config: Any) -> ClassHead:
    """The head that a model of this config has, by its names."""
    import torch

    with console.quiet_libraries(), torch.device("meta"):
        return ClassHead(model_class(config).from_config(config))


def weights_reader(base: Base) -> Callable[[str], Any]:
    """Reads single tensors of a base's files by their names; exit 4 for a name that they do not have."""
    from ftkit.io.tensors import read_finite

    layout = read_layout(local_files(base, weights=True))

    def read(name: str) -> Any:
        if name not in layout:
            hint = "transformers renames this architecture's tensors while it loads them: leave out --lora-init"
            raise UserError(f"{base.name}: its files name no tensor '{name}'", ExitCode.MODEL, hint=hint)
        return read_finite(layout[name], name)

    return read


def require_all_found(base: Base, found: Mapping[str, Any]) -> None:
    """transformers fills weights that the files lack with random numbers: refused. Weights without a place are said."""
    if missing := sorted(found["missing_keys"]):
        raise missing_tensor(base.name, missing)
    if unexpected := sorted(found["unexpected_keys"]):
        console.warn(f"{base.name}: no layer takes '{unexpected[0]}' ({len(unexpected)} tensors left out)")


def missing_tensor(name: str, missing: Sequence[str]) -> UserError:
    """The error for weights that the model has and its files lack."""
    return UserError(
        f"{name}: its files lack '{missing[0]}' ({len(missing)} in all)",
        ExitCode.MODEL,
        hint="download the whole model; the numbers of layers in config.json and in the files should be one",
    )


def check_tensors(base: Base, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The files of a folder hold what the model of its config needs; exit 4 names one missing or misshapen.

    shapes: of the model's parameters, tied ones once. Architectures whose tensors transformers renames while it loads
    are checked as far as the names are the same; for the rest, loading is the judge.
    """
    layout = read_layout(base.folder) if base.folder is not None else {}
    for name, place in layout.items():
        if name in shapes and place.shape != shapes[name] and place.dtype not in PACKED:
            given, needed = list(place.shape), list(shapes[name])
            hint = "config.json and weights belong to different models; download both again"
            raise UserError(
                f"{place.file}: tensor '{name}' is {given}, config.json makes it {needed}", ExitCode.MODEL, hint=hint
            )
    missing = sorted(set(shapes) - set(layout))
    if layout and missing and set(layout) <= set(shapes):
        raise missing_tensor(base.name, missing)


def config_sha256(base: Base) -> str:
    """sha256 of config.json, in hex: the base's identity beside its name."""
    return sha256(config_path(base).read_bytes()).hexdigest()


def weights_sha256(base: Base) -> str | None:
    """sha256 of name, format, shape and first bytes of every tensor; None for a Hugging Face id, which has its commit.

    Tells trainings of one architecture apart in milliseconds, which a checksum of all bytes does not.
    """
    if base.folder is None:
        return None
    digest = sha256()
    for name, place in sorted(read_layout(base.folder).items()):
        digest.update(f"{name} {place.dtype} {list(place.shape)}\n".encode())
        digest.update(first_bytes(place))
    return digest.hexdigest()


def first_bytes(place: TensorPlace) -> bytes:
    """The beginning of a tensor."""
    with place.file.open("rb") as file:
        file.seek(place.start)
        return file.read(min(place.nbytes, SAMPLED_BYTES))


def context_length(config: Any) -> int | None:
    """The longest input in tokens that the model was made for; None if the config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def widths_of(config: Any) -> tuple[int, int]:
    """(hidden size, blocks) of a model; what counts as a large one where its config does not say."""
    text = config.get_text_config()
    return getattr(text, "hidden_size", 4096), getattr(text, "num_hidden_layers", 32)


def new_weights(config: Any, *, dtype: Any, device: str) -> Any:
    """A model with random weights from torch's present seed."""
    from transformers import AutoModelForCausalLM

    with console.quiet_libraries():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).to(device)
