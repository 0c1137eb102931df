"""Where a setting's value comes from: flag, then environment, then files, then the default."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ftkit.core.settings import METHOD_FLAGS, flag_of
from ftkit.errors import ExitCode, UserError, did_you_mean

Settings = TypeVar("Settings")
EXCLUSIVE = [set(METHOD_FLAGS)]


@dataclass(frozen=True)
class Layer:
    """Values from one place; `name` says where (`--config x.toml`, `environment`), strongest layers come first."""

    name: str
    values: Mapping[str, Any]


def resolve(kind: type[Settings], layers: list[Layer]) -> tuple[Settings, dict[str, str]]:
    """The settings of a command and, for each field, the layer that decided it.

    Of options that exclude each other (the methods), the strongest layer that names one decides for all.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    types_of = field_types(kind)
    for layer in layers:
        known = set(values)
        for name, value in layer.values.items():
            if name not in types_of:
                raise unknown_key(name, layer.name, list(types_of))
            rivals = next((group for group in EXCLUSIVE if name in group), set())
            if name in known or rivals & known:
                continue
            values[name] = coerce(value, types_of[name], f"{layer.name}: {name}")
            sources[name] = layer.name
    for name in types_of:
        sources.setdefault(name, "default")
    return kind(**values), sources


def environment_layer(kind: type, environment: Mapping[str, str]) -> Layer:
    """FTKIT_MODEL, FTKIT_SEED, ...: one variable for each field, upper case."""
    named = {field.name: f"FTKIT_{field.name.upper()}" for field in fields(kind)}
    return Layer("environment", {name: environment[key] for name, key in named.items() if key in environment})


def field_types(kind: type) -> dict[str, Any]:
    """The bare type of each field of a settings dataclass, without its `Annotated` extras."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: get_args(h)[0] if get_origin(h := hints[f.name]) is Annotated else h for f in fields(kind)}


def unknown_key(name: str, layer: str, known: list[str]) -> UserError:
    """The error for a key that no option has."""
    near = did_you_mean(name, known)
    return UserError(f"{layer}: unknown setting '{name}'", ExitCode.USAGE, hint=f"{near}known: {', '.join(sorted(known))}")


def coerce(value: Any, wanted: Any, where: str) -> Any:
    """A value from a file or the environment as the type of its field; a number may come as text (YAML's 2e-4)."""
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        wanted = next(option for option in get_args(wanted) if option is not type(None))
        return coerce(value, wanted, where)
    if origin is Literal:
        if value not in get_args(wanted):
            allowed = ", ".join(map(str, get_args(wanted)))
            raise UserError(f"{where} = {value!r} is not one of {allowed}", ExitCode.USAGE,
                            hint=did_you_mean(str(value), list(map(str, get_args(wanted)))) or f"use {allowed}")
        return value
    if origin is list:
        return [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if wanted is bool:
        return to_bool(value, where)
    if isinstance(value, bool) or isinstance(value, (list, dict)):
        raise wrong_type(value, wanted, where)
    try:
        return wanted(value)
    except (TypeError, ValueError):
        raise wrong_type(value, wanted, where) from None


def to_bool(value: Any, where: str) -> bool:
    """True and False as TOML, YAML or the environment write them."""
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False, "": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise wrong_type(value, bool, where)
    return words[str(value).lower()]


def wrong_type(value: Any, wanted: type, where: str) -> UserError:
    """The error for a value of the wrong type."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return UserError(f"{where} = {value!r} should be {names.get(wanted, wanted.__name__)}", ExitCode.USAGE)


def describe(settings: Any, sources: Mapping[str, str]) -> list[str]:
    """Lines `name = value  # where it came from` for --print-config, readable as TOML."""
    lines = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        shown = "# " + field.name + " is not set" if value is None else f"{field.name} = {toml_value(value)}"
        lines.append(f"{shown}  # {sources[field.name]}" if value is not None else shown)
    return lines


def toml_value(value: Any) -> str:
    """A setting as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
        return f'"{escaped}"'
    return repr(value)


__all__ = ["Layer", "coerce", "describe", "environment_layer", "field_types", "flag_of", "resolve", "toml_value"]
