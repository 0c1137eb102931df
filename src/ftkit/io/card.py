"""ftkit.json: what an adapter or a model folder must say about itself so that nothing has to be typed again."""

import json
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ftkit.errors import ExitCode, UserError
from ftkit.io.template import Template, parse_template

FILE = "ftkit.json"
SCHEMA = "ftkit.card/1"


@dataclass(frozen=True)
class Card:
    """The facts that travel with trained weights.

    base_weights_sha256: as `base_model.weights_sha256` says it (None: from a Hugging Face id, or trained from scratch).
    template_text: the whole template file (None: rows had no template, or the tokenizer's chat template renders them).
    pattern, example: what `ftkit prep` made of the columns, and one instruction of that form.
    quantized_sha256: layer name -> sha256 of its quantised weight as training saw it. kept_16bit: names of layers that
    were left out of the quantisation.
    labels: the classes of a head for them, in the order of its logits; empty where text is written.
    added_tokens: what --add-tokens put behind the base's vocabulary; vocabulary: rows that its embeddings then had.
    system: the system message that all conversations of the training began with. generation: how answers should be made,
    as `answer_settings.RANGES` names it.
    """

    base: str
    base_location: str
    base_revision: str | None
    base_config_sha256: str
    method: str
    objective: str
    dtype: str
    max_length: int
    base_weights_sha256: str | None = None
    template_text: str | None = None
    template_fingerprint: str | None = None
    pattern: str | None = None
    example: str | None = None
    stop_tokens: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    quantized_sha256: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    kept_16bit: list[str] = field(default_factory=list)
    added_tokens: list[str] = field(default_factory=list)
    vocabulary: int | None = None
    system: str | None = None
    generation: dict[str, int | float] = field(default_factory=dict)

    @property
    def template(self) -> Template | None:
        """The template, its fingerprint checked."""
        if self.template_text is None:
            return None
        template = parse_template(self.template_text, FILE)
        if template.fingerprint != self.template_fingerprint:
            raise UserError(
                f"{FILE}: its template is {template.fingerprint}, not {self.template_fingerprint} as recorded",
                ExitCode.MODEL,
            )
        return template


def write_card(folder: Path, card: Card) -> None:
    """ftkit.json of a folder that is being made."""
    text = json.dumps({"schema": SCHEMA, **asdict(card)}, indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> Card | None:
    """The card of a folder; None where another tool made it. Exit 4 for a damaged one: its facts are relied upon."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged", ExitCode.MODEL, hint="copy the folder again from where it was trained")
    if values.pop("schema", None) != SCHEMA:
        raise UserError(
            f"{path}: not of this version of ftkit ({SCHEMA})", ExitCode.MODEL, hint="train again with this version"
        )
    hints = get_type_hints(Card)
    wrong = [key for key, value in values.items() if key not in hints or not is_of_type(value, hints[key])]
    wrong += [
        f.name for f in fields(Card) if f.name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if wrong:
        raise UserError(
            f"{path}: '{wrong[0]}' is missing, unknown or of a wrong type",
            ExitCode.MODEL,
            hint="train again with this version",
        )
    return Card(**values)


def is_of_type(value: Any, wanted: Any) -> bool:
    """True if a JSON value is what a field of the card holds: text, a number, a list or a dict of them, or None."""
    if isinstance(wanted, types.UnionType):
        return any(is_of_type(value, option) for option in get_args(wanted))
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is list:
        return isinstance(value, list) and all(is_of_type(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of_type(item, inner[1]) for item in value.values())
    return isinstance(value, wanted) and not isinstance(value, bool)
