"""ftkit.json: what an adapter or a model folder must say about itself so that nothing has to be typed again."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftkit.io.template import Template, parse_template
from ftkit.errors import ExitCode, UserError

FILE = "ftkit.json"
SCHEMA = "ftkit.card/1"


@dataclass(frozen=True)
class Card:
    """The facts that travel with trained weights.

    template_text: the whole template file (None: rows had no template, or the tokenizer's chat template renders them).
    pattern, example: what `ftkit prep` made of the columns, and one instruction of that form.
    quantized_sha256: layer name -> sha256 of its quantised weight as training saw it.
    """

    base: str
    base_location: str
    base_revision: str | None
    base_config_sha256: str
    method: str
    objective: str
    dtype: str
    max_length: int
    template_text: str | None = None
    template_fingerprint: str | None = None
    pattern: str | None = None
    example: str | None = None
    stop_tokens: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    quantized_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def template(self) -> Template | None:
        """The template, its fingerprint checked."""
        if self.template_text is None:
            return None
        template = parse_template(self.template_text, FILE)
        if template.fingerprint != self.template_fingerprint:
            raise UserError(f"{FILE}: its template is {template.fingerprint}, not {self.template_fingerprint} as recorded", ExitCode.MODEL)
        return template


def write_card(folder: Path, card: Card) -> None:
    """ftkit.json of a folder that is being made."""
    text = json.dumps({"schema": SCHEMA, **asdict(card)}, indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> Card | None:
    """The card of a folder; None where another tool made it."""
    try:
        values: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{folder / FILE}: damaged", ExitCode.MODEL) from None
    if values.pop("schema", None) != SCHEMA:
        raise UserError(f"{folder / FILE}: not of this version of ftkit ({SCHEMA})", ExitCode.MODEL)
    try:
        return Card(**values)
    except TypeError as error:
        raise UserError(f"{folder / FILE}: {error}", ExitCode.MODEL) from None
