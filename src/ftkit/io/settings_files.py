"""Settings in files: `ftkit.toml` in the current folder and whatever `--config` names, one table per command."""

import tomllib
from pathlib import Path
from typing import Any

from ftkit.errors import ExitCode, UserError, did_you_mean

COMMANDS = ("prep", "estimate-memory", "train", "eval", "merge", "chat")
PROJECT_FILE = "ftkit.toml"


def read_command_table(path: Path, command: str) -> dict[str, Any]:
    """The table of one command in a TOML or YAML file, keys with underscores."""
    tables = read_tables(path)
    for name in tables:
        if name not in COMMANDS:
            near = did_you_mean(name, list(COMMANDS))
            raise UserError(f"{path}: unknown table [{name}]", ExitCode.USAGE, hint=f"{near}tables: {', '.join(COMMANDS)}")
    table = tables.get(command, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: [{command}] is not a table", ExitCode.USAGE, hint=f"write [{command}] on a line of its own")
    return {key.replace("-", "_"): value for key, value in table.items()}


def read_tables(path: Path) -> dict[str, Any]:
    """All tables of a settings file; a missing or malformed file is a usage error that names the place."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", ExitCode.USAGE, hint="--config takes a .toml or .yaml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}", ExitCode.USAGE) from None
    tables = parse_yaml(text, path) if path.suffix in (".yaml", ".yml") else parse_toml(text, path)
    if not isinstance(tables, dict):
        raise UserError(f"{path}: holds no tables", ExitCode.USAGE, hint="write [train] and settings below it")
    return tables


def parse_toml(text: str, path: Path) -> Any:
    """TOML text; a syntax error carries its line from the parser."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}", ExitCode.USAGE) from None


def parse_yaml(text: str, path: Path) -> Any:
    """YAML text; a syntax error carries its line from the parser."""
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: {getattr(error, 'problem', error)}", ExitCode.USAGE) from None
