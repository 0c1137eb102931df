"""A prompt template: fields -> prompt and completion, with the fingerprint that travels with rows and adapters."""

import hashlib
import json
import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.plain_template import expression_of

KEYS = {
    "name",
    "kind",
    "required",
    "optional",
    "typed",
    "prompt",
    "completion",
    "chat",
    "chosen",
    "rejected",
    "label",
    "stop",
    "description",
}
NEEDED = {
    "completion": ("name", "completion"),
    "chat": ("name", "chat"),
    "classification": ("name", "completion", "label"),
    "preference": ("name", "prompt", "chosen", "rejected"),
}
"""What a template of each kind must have."""
LONGEST_TEMPLATE_BYTES = 64_000
LONGEST_RENDERING_CHARS = 50_000_000
LONGEST_LOOP_SECONDS = 5
LARGEST_POWER = 1_000
PLAIN_IS_ENOUGH = "mend the template: it should only put fields into text"
LOOP_WATCH = "ftkit_watched"
MARK = "\ue000typed\ue000"


@dataclass(frozen=True)
class Template:
    """One template file.

    kind "completion" renders fields to a prompt and a completion (or to one text, when there is no prompt);
    kind "chat" renders messages; "classification" a text (`completion`) and its label; "preference" a prompt with a
    chosen and a rejected answer. `text` is the file as it stands; its sha256 is the template's identity.
    """

    name: str
    kind: Literal["completion", "chat", "classification", "preference"]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    typed: str | None
    """The field that a person types in chat; the other fields are left empty there."""
    prompt: str | None
    completion: str | None
    chat: str | None
    stop: tuple[str, ...]
    """Strings that end an answer, besides the stop token."""
    text: str
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    description: str = ""

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """`alpaca@<12 hex>`: what rows and adapters carry."""
        return f"{self.name}@{self.sha256[:12]}"

    def quick(self, part: str) -> str | None:
        """The part as a Python expression of `fields`, which must all be texts; None if only Jinja can render it."""
        source = getattr(self, part)
        return expression_of(sandbox(), source) if source is not None else None

    def render_prompt(self, fields: Mapping[str, str]) -> str:
        """The prompt for these fields; a field that the template wants and that is missing is a data error."""
        return self._render(self._compiled["prompt"], self._filled(fields)) if self.prompt is not None else ""

    def render_completion(self, fields: Mapping[str, str]) -> str:
        """The answer for these fields, as it is trained (without the stop token)."""
        return self._render(self._compiled["completion"], self._filled(fields))

    def render_part(self, part: str, fields: Mapping[str, str], where: str) -> str:
        """One part (prompt, completion, label, chosen, rejected) for these fields; errors begin with `where`."""
        try:
            return self._render(self._compiled[part], self._filled(fields))
        except UserError as error:
            raise UserError(f"{where}: {error.message}", error.exit_code, hint=error.hint) from None

    def render_chat(self, messages: list[dict[str, Any]], *, generate: bool, **extra: Any) -> str:
        """A conversation as one text; with `generate` it ends where the assistant's answer begins."""
        values = {
            "messages": messages,
            "add_generation_prompt": generate,
            "bos_token": "",
            "eos_token": "",
            "tools": None,
        }
        return self._render(self._compiled["chat"], values | extra)

    def prompt_for(self, typed_text: str) -> str:
        """The prompt for what a person typed in chat."""
        if self.typed is None:
            return typed_text
        return self.render_prompt({self.typed: typed_text})

    def typed_text(self, prompt: str) -> str | None:
        """What a person would have typed to get this prompt; None if the prompt has more in it than that."""
        before, found, after = self.prompt_for(MARK).partition(MARK)
        if not found or len(prompt) < len(before) + len(after):
            return None
        if not (prompt.startswith(before) and prompt.endswith(after)):
            return None
        return prompt[len(before) : len(prompt) - len(after)]

    def _filled(self, fields: Mapping[str, str]) -> dict[str, str]:
        return {**dict.fromkeys(self.optional, ""), **fields}

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        environment = sandbox()
        names = ("prompt", "completion", "chat", "chosen", "rejected", "label")
        sources = {name: getattr(self, name) for name in names}
        return {
            part: compile_part(environment, source, f"template {self.name}, {part}")
            for part, source in sources.items()
            if source is not None
        }

    def _render(self, compiled: Any, values: Mapping[str, Any]) -> str:
        try:
            rendered = compiled.render(values)
        except UndefinedError as error:
            raise UserError(f"template {self.name}: {error.message}", ExitCode.DATA, hint=self._needs()) from None
        except SecurityError as error:
            raise UserError(
                f"template {self.name}: refused by the sandbox: {error}", ExitCode.DATA, hint=PLAIN_IS_ENOUGH
            ) from None
        except (TemplateError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise UserError(f"template {self.name}: {error}", ExitCode.DATA, hint=PLAIN_IS_ENOUGH) from None
        if len(rendered) > LONGEST_RENDERING_CHARS:
            raise UserError(
                f"template {self.name}: renders to {len(rendered):,} characters", ExitCode.DATA, hint=PLAIN_IS_ENOUGH
            )
        return str(rendered)

    def _needs(self) -> str:
        return f"it needs {', '.join(self.required)}; fill a field with --map FIELD=COLUMN"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without access to Python's insides, without loops that do not end, and without products that fill memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product or power that is not too large."""
        numbers = [abs(value) for value in (left, right) if isinstance(value, (int, float))]
        texts = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
        if (texts and numbers and texts[0] * numbers[0] > LONGEST_RENDERING_CHARS) or (
            operator == "**" and numbers and numbers[-1] > LARGEST_POWER
        ):
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Call(nodes.Name(LOOP_WATCH, "load"), [loop.iter], [], None, None, lineno=loop.lineno)
        return tree


def sandbox() -> Sandbox:
    """The environment for templates; a missing field is an error, line ends stay as written."""
    environment = Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals["raise_exception"] = refuse
    environment.globals[LOOP_WATCH] = watched
    environment.filters["tojson"] = plain_json
    return environment


def watched(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, as long as it does not take too long; loops inside it count too."""
    end = time.monotonic() + LONGEST_LOOP_SECONDS
    for item in items:
        if time.monotonic() > end:
            raise SecurityError(f"a loop takes more than {LONGEST_LOOP_SECONDS} seconds")
        yield item


def plain_json(value: Any, indent: int | None = None) -> str:
    """`tojson` as chat templates know it: Jinja's own writes `<` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse(message: str) -> None:
    """`raise_exception` of chat templates."""
    raise ValueError(message)


def compile_part(environment: ImmutableSandboxedEnvironment, source: str, where: str) -> Any:
    """Compile one Jinja text; a syntax error names its line."""
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{where}, line {error.lineno}: {error.message}", ExitCode.DATA, hint="mend the Jinja text"
        ) from None


def parse_template(text: str, where: str) -> Template:
    """A template from the text of its file; errors name `where` and, for TOML and Jinja mistakes, the line."""
    if len(text.encode()) > LONGEST_TEMPLATE_BYTES:
        raise UserError(f"{where}: larger than {LONGEST_TEMPLATE_BYTES:,} bytes", ExitCode.DATA)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{where}: {error}", ExitCode.DATA, hint="a template is a TOML file with name, prompt and completion"
        ) from None
    for key in table:
        if key not in KEYS:
            raise UserError(
                f"{where}: unknown key '{key}'",
                ExitCode.DATA,
                hint=did_you_mean(key, sorted(KEYS)) + f"keys: {', '.join(sorted(KEYS))}",
            )
    kind = table.get("kind", "chat" if "chat" in table else "completion")
    if kind not in NEEDED:
        raise UserError(f"{where}: unknown kind {kind!r}", ExitCode.DATA, hint=f"kinds: {', '.join(NEEDED)}")
    wanted = NEEDED[kind]
    if missing := [key for key in wanted if not isinstance(table.get(key), str)]:
        raise UserError(
            f"{where}: has no {' and no '.join(missing)}",
            ExitCode.DATA,
            hint=f"a {kind} template needs {', '.join(wanted)}",
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", table["name"]):
        raise UserError(
            f"{where}: name {table['name']!r} may hold letters, digits, '.', '_' and '-' only", ExitCode.DATA
        )
    template = Template(
        name=table["name"],
        kind=kind,
        required=tuple(table.get("required", ())),
        optional=tuple(table.get("optional", ())),
        typed=table.get("typed"),
        prompt=table.get("prompt"),
        completion=table.get("completion"),
        chat=table.get("chat"),
        stop=tuple(table.get("stop", ())),
        text=text,
        chosen=table.get("chosen"),
        rejected=table.get("rejected"),
        label=table.get("label"),
        description=str(table.get("description", "")),
    )
    _ = template._compiled
    return template
