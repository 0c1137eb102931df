"""A prompt template: fields -> prompt and completion, with the fingerprint that travels with rows and adapters."""

import hashlib
import json
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
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
LISTS = ("required", "optional", "stop")
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
LOOP_WATCH, JOIN_WATCH = "ftkit_watched", "ftkit_joined"
ENLARGING_FILTERS = ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "wordwrap")
FORMATS = ("format", "format_map", "%")
SPECIFICATION = re.compile(r"%[-+ #0-9.*]*|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")
"""A place in a format that is filled."""
TAKEN_WIDTH = re.compile(r"\*|\{[^{}]*\{")
"""In such a place: its width is a value too, as in `%*d` and `{:{width}}`."""
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
        return {part: compile_part(environment, source, part) for part, source in sources.items() if source is not None}

    def _render(self, compiled: Any, values: Mapping[str, Any]) -> str:
        try:
            rendered = compiled.render(values)
        except UndefinedError as error:
            hint = self._needs(str(error.message))
            raise UserError(f"template {self.name}: {error.message}", ExitCode.DATA, hint=hint) from None
        except SecurityError as error:
            raise UserError(
                f"template {self.name}: refused by the sandbox: {error}", ExitCode.DATA, hint=PLAIN_IS_ENOUGH
            ) from None
        except (TemplateError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise UserError(f"template {self.name}: {error}", ExitCode.DATA, hint=PLAIN_IS_ENOUGH) from None
        except (RecursionError, MemoryError) as error:
            what = (
                "calls itself without end" if isinstance(error, RecursionError) else "needs more memory than there is"
            )
            raise UserError(f"template {self.name}: {what}", ExitCode.DATA, hint=PLAIN_IS_ENOUGH) from None
        return str(rendered)

    def _needs(self, problem: str) -> str:
        """What to type where something is undefined: a name that is no field of the template has to become one."""
        unknown = re.fullmatch(r"'(\w+)' is undefined", problem)
        if unknown and self.kind != "chat" and unknown[1] not in (*self.required, *self.optional):
            fields = ", ".join(f'"{name}"' for name in (*self.required, unknown[1]))
            return f"make it a field in the template's file: required = [{fields}] (or list it as optional)"
        return f"it needs {', '.join(self.required)}; fill a field with --map FIELD=COLUMN"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without access to Python's insides, without loops that do not end, and without texts that fill memory."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product, power, sum or filled-in text that is not too large."""
        numbers = [abs(value) for value in (left, right) if isinstance(value, (int, float))]
        lengths = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
        if (
            (operator == "*" and lengths and numbers and lengths[0] * numbers[0] > LONGEST_RENDERING_CHARS)
            or (operator == "**" and numbers and numbers[-1] > LARGEST_POWER)
            or (operator == "+" and sum(lengths) > LONGEST_RENDERING_CHARS)
        ):
            raise SecurityError(f"the result of {operator} is too large")
        if operator == "%" and isinstance(left, str):
            refuse_large("%", left, *(right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        """A call; methods of texts (`ljust`, `format`, `replace`, ...) make none that is too large."""
        text = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        if isinstance(text, str):
            refuse_large(called.__name__, text, *args, *kwargs.values())
        return super().call(context, called, *args, **kwargs)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The pieces of a rendering, or of a part of it that is kept, as one text that is not too large."""
        kept, length = list[str](), 0
        for piece in pieces:
            length += len(piece)
            if length > LONGEST_RENDERING_CHARS:
                raise SecurityError(f"renders to more than {LONGEST_RENDERING_CHARS:,} characters")
            kept.append(piece)
        return "".join(kept)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Call(nodes.Name(LOOP_WATCH, "load"), [loop.iter], [], None, None, lineno=loop.lineno)
        for sum_ in tree.find_all(nodes.Concat):
            watch = nodes.Name(JOIN_WATCH, "load")
            sum_.nodes = [nodes.Call(watch, sum_.nodes, [], None, None, lineno=sum_.lineno)]
        return tree


def sandbox() -> Sandbox:
    """The environment for templates; a missing field is an error, line ends stay as written."""
    environment = Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals["raise_exception"] = refuse
    environment.globals[LOOP_WATCH] = watched
    environment.globals.pop("lipsum")  # as many words as asked for
    environment.globals[JOIN_WATCH] = joined
    environment.filters["tojson"] = plain_json
    for name in ENLARGING_FILTERS:
        environment.filters[name] = measured(name, environment.filters[name])
    return environment


def measured(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes no text that is too large."""
    piped = 1 if hasattr(make, "jinja_pass_arg") else 0  # its place: Jinja hands a context to some before it

    @wraps(make)  # with the marks by which Jinja knows what to hand to it
    def checked(*values: Any, **options: Any) -> Any:
        is_number = isinstance(values[piped], (int, float))  # what is changed, and no width
        refuse_large(name, "" if is_number else values[piped], *values[piped + 1 :], *options.values())
        return make(*values, **options)

    return checked


def refuse_large(name: str, *values: Any) -> None:
    """A SecurityError where a method or filter of texts would make one that is too large of these values.

    It pads to a width, perhaps one that is written in a format, or puts a text many times into others.
    """
    texts = [value for value in values if isinstance(value, str)]
    sizes = [value for value in values if isinstance(value, (int, float))]
    if name in FORMATS and texts:
        written = "".join(SPECIFICATION.findall(texts[0]))
        sizes = [int(width) for width in re.findall(r"\d{1,20}", written)] + (
            sizes if TAKEN_WIDTH.search(written) else []
        )
    elif name == "replace":
        sizes = [texts[0].count(texts[1]) * len(texts[2])] if len(texts) > 2 else []
    elif name == "join":
        items = next((value for value in values if isinstance(value, (list, tuple))), None)
        sizes = [len(texts[0]) * len(texts[1])] if len(texts) > 1 else []
        if items is not None:
            sizes = [len(items) * len("".join(texts[:1])) + sum(len(str(each)) for each in items)]
    if any(size > LONGEST_RENDERING_CHARS for size in sizes):
        raise SecurityError(f"the result of {name} is too large")


def joined(*values: Any) -> str:
    """What `~` makes of values."""
    return Sandbox.concat(map(str, values))


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


class SyntaxProblem(TemplateSyntaxError):
    """A mistake in the Jinja text of one part of a template; `name` is the part."""


def compile_part(environment: ImmutableSandboxedEnvironment, source: str, part: str) -> Any:
    """Compile one Jinja text; what is wrong with it is a SyntaxProblem with its line."""
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise SyntaxProblem(error.message or "not Jinja", error.lineno, part) from None
    except (RecursionError, MemoryError, SyntaxError):  # of Python, to which Jinja translates
        raise SyntaxProblem("nested too deep", 1, part) from None


def place_of(text: str, part: str, source: str, line: int) -> int | None:
    """The line in a template's file of a line in one of its parts; None where TOML's escapes hide it."""
    text = text.replace("\r\n", "\n")  # as TOML reads it
    keys = re.finditer(rf"^[ \t]*{part}[ \t]*=[ \t]*", text, re.MULTILINE)
    key = next((key for key in keys if is_toml(text[: key.start()])), None)  # others stand inside texts
    if key is None:
        return None
    beginning = text.find("\n".join(source.split("\n")[:line]), key.end())
    if beginning >= 0:
        return text.count("\n", 0, beginning) + line
    is_one_line = not text.startswith(('"""', "'''"), key.end())
    return text.count("\n", 0, key.end()) + 1 if is_one_line else None


def is_toml(text: str) -> bool:
    """True for the beginning of a file that ends between two keys."""
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def parse_template(text: str, where: str) -> Template:
    """A template from the text of its file; errors name `where` and, for TOML and Jinja mistakes, the line."""
    if len(text.encode()) > LONGEST_TEMPLATE_BYTES:
        raise UserError(f"{where}: larger than {LONGEST_TEMPLATE_BYTES:,} bytes", ExitCode.DATA)
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        problem = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{where}: {problem}", ExitCode.DATA, hint="a template is a TOML file with name, prompt and completion"
        ) from None
    check_keys(table, where)
    template = made_of(table, text, where)
    try:
        _ = template._compiled
    except SyntaxProblem as error:
        part = str(error.name)
        line = place_of(text, part, getattr(template, part), error.lineno)
        place = f"{where}:{line}: {part}" if line else f"{where}: {part}, line {error.lineno}"
        raise UserError(f"{place}: {error.message}", ExitCode.DATA, hint="mend the Jinja text") from None
    return template


def check_keys(table: Mapping[str, Any], where: str) -> None:
    """Every key of a template's file is known and holds what it should: a text, or a list of texts."""
    for key, value in table.items():
        if key not in KEYS:
            raise UserError(
                f"{where}: unknown key '{key}'",
                ExitCode.DATA,
                hint=did_you_mean(key, sorted(KEYS)) + f"keys: {', '.join(sorted(KEYS))}",
            )
        texts = value if key in LISTS and isinstance(value, list) else [None] if key in LISTS else [value]
        if not all(isinstance(each, str) for each in texts):
            wanted = ("a list of texts", '["...", "..."]') if key in LISTS else ("a text", '"..."')
            raise UserError(f"{where}: '{key}' should be {wanted[0]}", ExitCode.DATA, hint=f"{key} = {wanted[1]}")


def made_of(table: Mapping[str, Any], text: str, where: str) -> Template:
    """The template that a file's keys make, if it has those that its kind needs."""
    kind = table.get("kind", "chat" if "chat" in table else "completion")
    if kind not in NEEDED:
        raise UserError(f"{where}: unknown kind {kind!r}", ExitCode.DATA, hint=f"kinds: {', '.join(NEEDED)}")
    wanted = NEEDED[kind]
    if missing := [key for key in wanted if key not in table]:
        raise UserError(
            f"{where}: has no {' and no '.join(missing)}",
            ExitCode.DATA,
            hint=f"a {kind} template needs {', '.join(wanted)}",
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", table["name"]):
        raise UserError(
            f"{where}: name {table['name']!r} may hold letters, digits, '.', '_' and '-' only", ExitCode.DATA
        )
    return Template(
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
        description=table.get("description", ""),
    )
