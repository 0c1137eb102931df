"""Settings in files: `ftkit.toml` in the current folder and whatever `--config` names, one table per command."""

import re
import tomllib
from pathlib import Path
from typing import Any

from ftkit.errors import ExitCode, UserError, did_you_mean

COMMANDS = ("prep", "estimate-memory", "train", "eval", "merge", "chat")
PROJECT_FILE = "ftkit.toml"
TOML_LINE = re.compile(r"""\s*(?:\[\s*(?P<table>[^]]+?)\s*\]|(?P<key>[\w-]+|"[^"]+"|'[^']+')\s*=)""")

Lines = dict[tuple[str, ...], int]
"""Line, from 1, of a table (its name) or of a key (table, name)."""


def read_command_table(path: Path, command: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The table of one command in a settings file, keys with underscores; and where each key stands (`file:line`)."""
    tables, lines = read_tables(path)
    for name, table in tables.items():
        place = place_of(path, lines, name)
        if name not in COMMANDS:
            raise unknown_table(name, table, place)
        if not isinstance(table, dict):
            hint = f"write [{name}] on a line of its own"
            raise UserError(f"{place}: [{name}] is not a table", ExitCode.USAGE, hint=hint)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, value in tables.get(command, {}).items():
        key = str(name).replace("-", "_")
        places[key] = place_of(path, lines, command, str(name))
        if key in values:
            raise UserError(f"{places[key]}: '{key}' is set twice", ExitCode.USAGE, hint="keep one of them")
        values[key] = value
    return values, places


def is_record(path: Path) -> bool:
    """True for the config.toml that a training run wrote into its folder."""
    return path.name == "config.toml" and path.with_name("run.json").is_file()


def place_of(path: Path, lines: Lines, *key: str) -> str:
    """`file:line` of a table or key, the file alone where the line is not known."""
    return f"{path}:{lines[key]}" if key in lines else str(path)


def unknown_table(name: str, value: Any, place: str) -> UserError:
    """The error for a table that no command has, and for a setting that stands in none."""
    if not isinstance(value, dict):
        return UserError(f"{place}: '{name}' stands outside of a table", ExitCode.USAGE, hint="write [train] above it")
    near = did_you_mean(name, list(COMMANDS))
    return UserError(f"{place}: unknown table [{name}]", ExitCode.USAGE, hint=f"{near}tables: {', '.join(COMMANDS)}")


def read_tables(path: Path) -> tuple[dict[str, Any], Lines]:
    """All tables of a settings file; a missing or malformed file is a usage error that names the place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", ExitCode.USAGE, hint="--config takes a .toml or .yaml file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", ExitCode.USAGE) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", ExitCode.USAGE) from None
    return parse_yaml(text, path) if path.suffix in (".yaml", ".yml") else parse_toml(text, path)


def parse_toml(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    """Tables and lines of TOML text; a syntax error carries its line from the parser."""
    try:
        return tomllib.loads(text), toml_lines(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}", ExitCode.USAGE) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply", ExitCode.USAGE) from None


def toml_lines(text: str) -> Lines:
    """Where tables and keys stand, by the look of the lines: tomllib keeps no places. The first such line counts."""
    lines: Lines = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        found = TOML_LINE.match(line)
        if found and found["table"]:
            table = (found["table"].strip("\"'"),)
            lines.setdefault(table, number)
        elif found:
            lines.setdefault((*table, found["key"].strip("\"'")), number)
    return lines


def parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    """Tables and lines of YAML text; a syntax error carries its line from the parser."""
    import yaml

    try:
        tables, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: {getattr(error, 'problem', error)}", ExitCode.USAGE) from None
    except (ValueError, RecursionError) as error:  # a date that is none; nested too deeply
        raise UserError(f"{path}: {error}", ExitCode.USAGE) from None
    if tables is None:
        return {}, {}
    if not isinstance(tables, dict):
        raise UserError(f"{path}: holds no tables", ExitCode.USAGE, hint="write train: and settings indented below it")
    lines: Lines = {}
    note_yaml_lines(root, (), lines, path)
    return {str(name): table for name, table in tables.items()}, lines


def note_yaml_lines(node: Any, inside: tuple[str, ...], lines: Lines, path: Path) -> None:
    """Lines of the keys of a YAML mapping and of those in it; a key that stands twice is an error, as in TOML."""
    for key, value in node.value:
        place = (*inside, str(key.value))
        number = key.start_mark.line + 1
        if place in lines:
            raise UserError(f"{path}:{number}: '{key.value}' stands twice", ExitCode.USAGE, hint="keep one of them")
        lines[place] = number
        if value.id == "mapping" and not inside:
            note_yaml_lines(value, place, lines, path)
