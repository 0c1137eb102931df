"""The command line: options come from a dataclass of each command, the work is in `ftkit.commands`.

`main` turns a `UserError` into words and an exit status; nothing heavy is imported before a command runs.
"""

import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from typer._click.exceptions import ClickException, UsageError

from ftkit import __version__, console
from ftkit.core.configuration import Layer, describe, environment_layer, field_types, resolve, settle_unused
from ftkit.core.durations import seconds_of
from ftkit.core.model_settings import ModelSettings
from ftkit.core.options import Argument, Option, flag_of
from ftkit.errors import ExitCode, UserError, is_out_of_memory
from ftkit.io.settings_files import PROJECT_FILE, is_record, read_command_table
from ftkit.libraries import import_transformers, keep_few_primitives
from ftkit.stopping import stop_requests

if TYPE_CHECKING:
    from ftkit.core.chat_settings import ChatSettings
    from ftkit.core.estimate_settings import EstimateSettings
    from ftkit.core.eval_settings import EvalSettings
    from ftkit.core.merge_settings import MergeSettings
    from ftkit.core.prep_settings import PrepSettings
    from ftkit.core.train_settings import TrainSettings

COMMON = {
    "config": (str | None, None, typer.Option(help="Settings from this .toml or .yaml file", metavar="FILE")),
    "print_config": (bool, False, typer.Option("--print-config", help="Print the settings and where each came from")),
    "quiet": (bool, False, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors")),
    "verbose": (bool, False, typer.Option("--verbose", "-v", help="Say more")),
    "debug": (bool, False, typer.Option("--debug", help="Show the traceback of an error")),
}


def run_prep(settings: "PrepSettings") -> None:
    """Forward to the command; its libraries load here, not for --help."""
    from ftkit.commands import prep

    prep.run(settings)


def run_estimate_memory(settings: "EstimateSettings") -> None:
    """Forward to the command."""
    from ftkit.commands import estimate_memory

    estimate_memory.run(settings)


def run_train(settings: "TrainSettings", chat: dict[str, Any]) -> None:
    """Forward to the command. Signals and the time limit count from here: loading libraries takes seconds.

    chat: what the files of settings say for chat, which the trained folder takes along.
    """
    keep_few_primitives()
    hint = "the same command goes on from the last checkpoint, or begins again where there is none"
    with stop_requests(seconds_of(settings.time_limit or ""), hint=hint) as stop:
        import_transformers()
        from ftkit.commands import train

        train.run(settings, stop, chat)


def run_eval(settings: "EvalSettings") -> None:
    """Forward to the command, which may be stopped anywhere: what --cache has is whole."""
    kept = f"answers so far are in {settings.cache}: the same command goes on from there"
    hint = kept if settings.cache else "with --cache FILE the same command would go on where it was"
    with stop_requests(hint=hint):
        import_transformers()
        from ftkit.commands import eval as command

        command.run(settings)


def run_merge(settings: "MergeSettings") -> None:
    """Forward to the command."""
    import_transformers()
    from ftkit.commands import merge

    merge.run(settings)


def run_chat(settings: "ChatSettings") -> None:
    """Forward to the command, which may be ended anywhere; Ctrl-C is for the person at the terminal."""
    hint = "what was typed is in the history, what was answered stays; /save keeps a conversation"
    with stop_requests(hint=hint, signals=(signal.SIGTERM, signal.SIGHUP)):
        import_transformers()
        from ftkit.commands import chat

        chat.run(settings)


COMMANDS: dict[str, tuple[str, Callable[..., None], str]] = {
    "prep": ("prep_settings.PrepSettings", run_prep, "ftkit prep reddot.csv --template alpaca > train.jsonl"),
    "estimate-memory": (
        "estimate_settings.EstimateSettings",
        run_estimate_memory,
        "ftkit estimate-memory --qlora --r 8 --targets all-linear --gpu t4",
    ),
    "train": (
        "train_settings.TrainSettings",
        run_train,
        "ftkit train train.jsonl --qlora --r 8 --targets all-linear",
    ),
    "eval": (
        "eval_settings.EvalSettings",
        run_eval,
        "ftkit eval --baseline --forgetting default --report report.html",
    ),
    "merge": ("merge_settings.MergeSettings", run_merge, "ftkit merge"),
    "chat": ("chat_settings.ChatSettings", run_chat, "ftkit chat"),
}
"""For each command its options, what runs it and an example."""


def settings_of(command: str) -> type:
    """The dataclass of a command's options. Only it is loaded, as those of all six take some 50 ms."""
    module, kind = COMMANDS[command][0].split(".")
    found: type = getattr(import_module(f"ftkit.core.{module}"), kind)
    return found


def typer_command(*names: str) -> Any:
    """What typer makes of these commands: of all of them a group, of a single one that command."""
    app = typer.Typer(
        name="ftkit",
        help="Fine-tune large language models: six commands that chain through files and pipes.",
        epilog="ftkit --version prints the version; ftkit COMMAND --help explains a command.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: rich would cost a quarter of the time budget of --help
    )
    for name in names:
        declare(app, name, settings_of(name), COMMANDS[name][2])
    return typer.main.get_command(app)


def declare(app: typer.Typer, name: str, kind: type, example: str) -> None:
    """Register a command whose options are the fields of a settings dataclass."""

    def command() -> None:
        """What typer reads options from; `run` calls the work."""

    hints, types = get_type_hints(kind, include_extras=True), field_types(kind)
    parameters = [parameter_of(field, types[field.name], get_args(hints[field.name])[1]) for field in fields(kind)]
    for key, (type_, default, option) in COMMON.items():
        parameters.append(keyword(key, Annotated[type_, option], default))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = f"{(kind.__doc__ or '').strip()}\n\nExample: {example}"
    app.command(name)(command)


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter of a command's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def parameter_of(field: Any, bare: Any, extra: Option | Argument) -> inspect.Parameter:
    """A settings field as typer declares it: `--name` is the field's name, other names stand beside it."""
    default = None if field.default is MISSING else field.default
    default = list(default) if isinstance(default, tuple) else default
    if isinstance(extra, Argument):
        return keyword(
            field.name,
            Annotated[bare, typer.Argument(help=extra.help, metavar=extra.metavar, show_default=False)],
            default,
        )
    shown = default not in (None, False, [])
    option = typer.Option(flag_of(field.name), *extra.names, help=extra.help, metavar=extra.metavar, show_default=shown)
    return keyword(field.name, Annotated[bare, option], default)


def execute(name: str, kind: type, forward: Callable[..., None], flags: dict[str, Any]) -> None:
    """Resolve the settings of a command from all layers, then run it."""
    common = {key: flags.pop(key) for key in list(flags) if key in COMMON}
    console.set_level(
        console.QUIET if common.get("quiet") else console.VERBOSE if common.get("verbose") else console.NORMAL
    )
    layers = [
        Layer("command line", flags, {key: flag_of(key) for key in flags}),
        environment_layer(kind, os.environ),
        *file_layers(name, common.get("config")),
    ]
    settings: tuple[Any, dict[str, str]] = resolve(kind, layers)
    resolved, sources = settings
    if isinstance(resolved, ModelSettings):
        resolved, sources = settle_unused(resolved, sources, layers)
    if callable(getattr(resolved, "check", None)):  # merge has an option of that name
        resolved.check()
    if common.get("print_config"):
        sys.stdout.write(f"[{name}]\n" + "\n".join(describe(resolved, sources)) + "\n")
        return
    chat = chat_of_files(common.get("config")) if name == "train" else {}
    console.silence_libraries()
    share_processors()
    forward(resolved, **({"chat": chat} if name == "train" else {}))


def chat_of_files(config: str | None) -> dict[str, Any]:
    """What the files of settings say for chat: setting -> value."""
    kind: Any = settings_of("chat")
    settings, sources = resolve(kind, file_layers("chat", config))
    settings.check()
    return {name: getattr(settings, name) for name, source in sources.items() if source != "default"}


def file_layers(name: str, config: str | None) -> list[Layer]:
    """What the file of --config and `ftkit.toml` in the current folder say about a command, the first one stronger.

    estimate-memory also takes a run's own file, which has a table for train: what costs memory in it.
    """
    files = [Path(config)] if config else []
    files += [Path(PROJECT_FILE)] if Path(PROJECT_FILE).is_file() else []
    layers = [Layer(str(path), *read_command_table(path, name), is_record=is_record(path)) for path in files]
    if config and name == "estimate-memory":
        from ftkit.core.estimate_settings import settings_of_training

        values, places = read_command_table(Path(config), "train")
        shared = settings_of_training(values, places)
        layers.insert(1, Layer(config, shared, places, is_record=is_record(Path(config))))
    return layers


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `ftkit`: runs a command and exits with its documented status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stderr is None:  # closed: what is said to a person is lost, the work goes on
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(int(guard(partial(run, arguments), debug="--debug" in arguments)))


def run(arguments: list[str]) -> None:
    """Read the command line, then do what it says."""
    if sys.stdout is None:
        raise UserError("stdout is closed", ExitCode.IO, hint="ftkit writes its results there")
    if arguments == ["--version"]:
        sys.stdout.write(f"ftkit {__version__}\n")
    elif arguments and arguments[0] in COMMANDS:
        run_command(arguments[0], arguments[1:])
    else:
        try:
            typer_command(*COMMANDS)(args=arguments or ["--help"], prog_name="ftkit", standalone_mode=False)
        except SystemExit:  # typer's answer to a reader of --help that went away
            raise BrokenPipeError from None


def run_command(name: str, arguments: list[str]) -> None:
    """Run a command, or print its help.

    typer's parser finds the options; `resolve` makes numbers of their text, as of that in files and in the environment. To
    convert it, typer would load pydantic, which takes as long as all else up to prep's first row.
    """
    command = typer_command(name)
    context = typer.Context(command, info_name=f"ftkit {name}")
    try:
        given, unread, _ = command.make_parser(context).parse_args(arguments)
    except UsageError as error:
        error.ctx = error.ctx or context
        raise
    if "help" in given:
        sys.stdout.write(str(command.get_help(context)) + "\n")
        return
    if unread:
        context.fail(f"Got unexpected extra argument(s) ({' '.join(unread)})")
    execute(
        name, settings_of(name), COMMANDS[name][1], {key: value for key, value in given.items() if value is not None}
    )


def share_processors() -> None:
    """Let OpenMP's threads sleep while they wait, before torch loads it.

    By default they spin. On a machine with other work, a spinning thread takes the processor from the one it waits for:
    measured with two threads on two busy cores, training was more than ten times slower than with sleeping ones.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def guard(work: Callable[[], None], *, debug: bool) -> ExitCode:
    """Run; every way that it can end becomes an exit status, and words where a person needs them."""
    try:
        work()
        sys.stdout.flush()
        return ExitCode.OK
    except BrokenPipeError:
        status = ExitCode.CLOSED_PIPE
    except KeyboardInterrupt:
        console.error("interrupted")
        status = ExitCode.INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        status = explain(error, debug=debug)
    settle_stdout()
    return status


def explain(error: Exception, *, debug: bool) -> ExitCode:
    """Say in words what went wrong; returns the exit status that stands for it."""
    if isinstance(error, UserError):
        console.error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, ClickException):
        console.error(error.format_message().replace(": Value error, ", ": "), usage_hint(error))
        return ExitCode.USAGE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        console.error(f"{where}{error.strerror or error}")
        return ExitCode.IO
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # it has no errno
        console.error(f"a file could not be written: {error}")
        return ExitCode.IO
    if is_out_of_memory(error):
        console.error(
            "out of memory", "make --micro-batch or --max-length smaller; ftkit estimate-memory says what fits"
        )
        return ExitCode.MEMORY
    console.error(f"internal error: {type(error).__name__}: {str(error)[:300]}", crash_hint(debug=debug))
    return ExitCode.BUG


def usage_hint(error: ClickException) -> str:
    """What to type after a usage error."""
    context = error.ctx if isinstance(error, UsageError) else None
    return f"{context.command_path if context else 'ftkit'} --help"


def crash_hint(*, debug: bool) -> str:
    """For an error of ours: the traceback goes into a file, or with --debug on the screen."""
    if debug:
        return "this is a bug of ftkit; the traceback is above"
    import tempfile

    with tempfile.NamedTemporaryFile("w", prefix="ftkit-crash-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return f"this is a bug of ftkit; the traceback is in {file.name}, or add --debug"


def settle_stdout() -> None:
    """Write what is left of the output. Where that fails, drop it: Python would try again at exit, and fail aloud."""
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # full or closed
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
