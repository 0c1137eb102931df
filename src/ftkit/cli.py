"""The command line: options come from `ftkit.core.settings`, the work is in `ftkit.commands`.

`main` turns a `UserError` into words and an exit status; nothing heavy is imported before a command runs.
"""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer._click.exceptions import ClickException, UsageError

from ftkit import __version__, console
from ftkit.core import settings as kinds
from ftkit.core.configuration import Layer, describe, environment_layer, field_types, resolve
from ftkit.errors import ExitCode, UserError
from ftkit.io.settings_files import PROJECT_FILE, read_command_table

app = typer.Typer(
    name="ftkit",
    help="Fine-tune large language models: six commands that chain through files and pipes.",
    epilog="ftkit --version prints the version; ftkit COMMAND --help explains a command.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would cost a quarter of the time budget of --help
)
COMMON = {
    "config": (str | None, None, typer.Option(help="Settings from this .toml or .yaml file", metavar="FILE", rich_help_panel="Common")),
    "print_config": (bool, False, typer.Option("--print-config", help="Print the settings and where each came from", rich_help_panel="Common")),
    "quiet": (bool, False, typer.Option("--quiet", "-q", help="Say nothing but errors", rich_help_panel="Common")),
    "verbose": (bool, False, typer.Option("--verbose", "-v", help="Say more", rich_help_panel="Common")),
    "debug": (bool, False, typer.Option("--debug", help="Show the traceback of an error", rich_help_panel="Common")),
}


def run_prep(settings: kinds.PrepSettings) -> None:
    """Forward to the command; its libraries load here, not for --help."""
    from ftkit.commands import prep

    prep.run(settings)


def run_estimate_memory(settings: kinds.EstimateSettings) -> None:
    """Forward to the command."""
    from ftkit.commands import estimate_memory

    estimate_memory.run(settings)


def run_train(settings: kinds.TrainSettings) -> None:
    """Forward to the command."""
    from ftkit.commands import train

    train.run(settings)


def run_eval(settings: kinds.EvalSettings) -> None:
    """Forward to the command."""
    from ftkit.commands import eval as command

    command.run(settings)


def run_merge(settings: kinds.MergeSettings) -> None:
    """Forward to the command."""
    from ftkit.commands import merge

    merge.run(settings)


def run_chat(settings: kinds.ChatSettings) -> None:
    """Forward to the command."""
    from ftkit.commands import chat

    chat.run(settings)


COMMANDS: dict[str, tuple[type, Callable[[Any], None], str]] = {
    "prep": (kinds.PrepSettings, run_prep, "ftkit prep reddot.csv --template alpaca > train.jsonl"),
    "estimate-memory": (kinds.EstimateSettings, run_estimate_memory, "ftkit estimate-memory --qlora --r 8 --targets all-linear --gpu t4"),
    "train": (kinds.TrainSettings, run_train, "ftkit train train.jsonl --qlora --r 8 --targets all-linear"),
    "eval": (kinds.EvalSettings, run_eval, "ftkit eval --baseline"),
    "merge": (kinds.MergeSettings, run_merge, "ftkit merge"),
    "chat": (kinds.ChatSettings, run_chat, "ftkit chat"),
}


def declare(name: str, kind: type, forward: Callable[[Any], None], example: str) -> None:
    """Register a command whose options are the fields of a settings dataclass."""

    def command(context: typer.Context, **given: Any) -> None:
        typed = {key for key in given if context.get_parameter_source(key).name == "COMMANDLINE"}  # type: ignore[union-attr]
        execute(name, kind, forward, {key: value for key, value in given.items() if key in typed})

    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    hints, types = get_type_hints(kind, include_extras=True), field_types(kind)
    parameters += [parameter_of(field, types[field.name], get_args(hints[field.name])[1]) for field in fields(kind)]
    for key, (type_, default, option) in COMMON.items():
        parameters.append(keyword(key, Annotated[type_, option], default))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = f"{(kind.__doc__ or '').strip()}\n\nExample: {example}"
    app.command(name)(command)


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter of a command's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def parameter_of(field: Any, bare: Any, extra: kinds.Option | kinds.Argument) -> inspect.Parameter:
    """A settings field as typer declares it: `--name` is the field's name, other names stand beside it."""
    default = None if field.default is MISSING else field.default
    default = list(default) if isinstance(default, tuple) else default
    if isinstance(extra, kinds.Argument):
        return keyword(field.name, Annotated[bare, typer.Argument(help=extra.help, metavar=extra.metavar, show_default=False)], default)
    shown = default not in (None, False, [])
    option = typer.Option(kinds.flag_of(field.name), *extra.names, help=extra.help, metavar=extra.metavar, show_default=shown)
    return keyword(field.name, Annotated[bare, option], default)


def execute(name: str, kind: type, forward: Callable[[Any], None], flags: dict[str, Any]) -> None:
    """Resolve the settings of a command from all layers, then run it."""
    common = {key: flags.pop(key) for key in list(flags) if key in COMMON}
    console.set_level(console.QUIET if common.get("quiet") else console.VERBOSE if common.get("verbose") else console.NORMAL)
    layers = [Layer("command line", flags), environment_layer(kind, os.environ)]
    files = [Path(common["config"])] if common.get("config") else []
    files += [Path(PROJECT_FILE)] if Path(PROJECT_FILE).is_file() else []
    layers += [Layer(str(path), read_command_table(path, name)) for path in files]
    resolved, sources = resolve(kind, layers)
    if callable(getattr(resolved, "check", None)):  # merge has an option of that name
        resolved.check()
    if common.get("print_config"):
        sys.stdout.write(f"[{name}]\n" + "\n".join(describe(resolved, sources)) + "\n")
        return
    console.silence_libraries()
    guard(partial(forward, resolved), debug=bool(common.get("debug")))


def guard(work: Callable[[], None], *, debug: bool) -> None:
    """Run a command; every way that it can end becomes an exit status, and words where a person needs them."""
    try:
        work()
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        raise leave(error.exit_code, error.message, error.hint) from None
    except BrokenPipeError:
        silence_stdout()
        raise leave(ExitCode.CLOSED_PIPE) from None
    except KeyboardInterrupt:
        raise leave(ExitCode.INTERRUPTED, "interrupted") from None
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise leave(ExitCode.IO, f"{where}{error.strerror or error}") from None
    except MemoryError:
        raise leave(ExitCode.MEMORY, "out of memory", "make --micro-batch or --max-length smaller") from None


def leave(code: ExitCode, message: str | None = None, hint: str | None = None) -> typer.Exit:
    """Print the words of an ending and return the exit that carries its status."""
    if message:
        console.error(message, hint)
    return typer.Exit(code)


def silence_stdout() -> None:
    """After a closed pipe: Python flushes stdout once more at exit, which must not fail aloud."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `ftkit`: runs a command and exits with its documented status.

    `--version` is answered here: as an option of the group it would make typer load pydantic for every --help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        sys.stdout.write(f"ftkit {__version__}\n")
        sys.exit(ExitCode.OK)
    try:
        status = app(args=arguments or ["--help"], prog_name="ftkit", standalone_mode=False)
    except UserError as error:
        console.error(error.message, error.hint)
        status = error.exit_code
    except ClickException as error:
        console.error(error.format_message(), usage_hint(error))
        status = ExitCode.USAGE
    except Exception:
        raise_or_report()
        status = ExitCode.BUG
    sys.exit(int(status or 0))


def usage_hint(error: ClickException) -> str:
    """What to type after a usage error."""
    context = error.ctx if isinstance(error, UsageError) else None
    return f"{context.command_path if context else 'ftkit'} --help"


def raise_or_report() -> None:
    """An error of ours: keep the traceback in a file, show one line (all of it with --debug)."""
    import tempfile
    import traceback

    text = traceback.format_exc()
    if "--debug" in sys.argv:
        sys.stderr.write(text)
        return
    with tempfile.NamedTemporaryFile("w", prefix="ftkit-crash-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(text)
    last = text.strip().splitlines()[-1]
    console.error(f"internal error: {last[:300]}", f"this is a bug of ftkit; the traceback is in {file.name}, or add --debug")


for _name, (_kind, _forward, _example) in COMMANDS.items():
    declare(_name, _kind, _forward, _example)
