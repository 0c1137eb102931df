"""Where a setting's value comes from: flag, then environment, then files, then the default."""

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ftkit.core.model_settings import METHOD_WORDS, ModelSettings
from ftkit.core.options import flag_of
from ftkit.errors import ExitCode, UserError, did_you_mean

Settings = TypeVar("Settings")
EXCLUSIVE = [{*METHOD_WORDS, "train_layers"}, {"qlora", "load_in_8bit", "full", "quantize"}]

OF_A_METHOD = ("lr", "targets", "dtype")
"""Settings whose defaults a method has of its own: a run's record holds what they became."""


@dataclass(frozen=True)
class Layer:
    """Values from one place; `name` says where (`x.toml`, `environment`), strongest layers come first.

    places: where each value stands (`x.toml:3`, `FTKIT_R`, `--r`), for the errors about it. is_record: a run wrote down what
    it was made with, defaults too, so that nobody asked for each of the values.
    """

    name: str
    values: Mapping[str, Any]
    places: Mapping[str, str] = field(default_factory=dict)
    is_record: bool = False

    def place(self, key: str) -> str:
        """Where a value stands, as well as it is known."""
        return self.places.get(key, self.name)

    def spelled(self, key: str) -> str:
        """A setting with its place; a flag is both."""
        place = self.place(key)
        return place if place == flag_of(key) else f"{place}: {key}"


def resolve(kind: type[Settings], layers: list[Layer]) -> tuple[Settings, dict[str, str]]:
    """The settings of a command and, for each field, the layer that decided it.

    Of options that exclude each other (the methods), the strongest layer that asks for one decides for all.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    types_of = field_types(kind)
    for layer in layers:
        known, asked_for = set(values), {name for name, value in values.items() if value not in (None, False)}
        for name, value in layer.values.items():
            if name not in types_of:
                raise unknown_key(name, layer.place(name), list(types_of))
            checked = coerce(value, types_of[name], layer.spelled(name))
            rivals = set[str]().union(*(group for group in EXCLUSIVE if name in group))
            if name in known or rivals & asked_for:
                continue
            values[name], sources[name] = checked, layer.name
    for name in types_of:
        sources.setdefault(name, "default")
    return kind(**values), sources


def settle_unused(
    settings: ModelSettings, sources: Mapping[str, str], layers: list[Layer]
) -> tuple[ModelSettings, dict[str, str]]:
    """The settings and their sources, where nothing was asked for that changes nothing beside the other options: exit 2.

    What a run's record says of it falls back to the default; under another method so does what was settled for the run's own.
    """
    by_name = {layer.name: layer for layer in layers}
    given = {name: by_name[source] for name, source in sources.items() if source != "default"}
    unused, others = settings.unused(given), others_record(settings, layers)
    for name, (what, hint) in unused.items():
        layer = given[name]
        if not layer.is_record:
            place = layer.places.get(name, flag_of(name))
            said = place if place == flag_of(name) else f"{place}: {name}"
            raise UserError(f"{said} {what}", ExitCode.USAGE, hint=hint)
    left_out = {*unused, *(name for name in OF_A_METHOD if name in given and given[name].name == others)}
    defaults: dict[str, Any] = {f.name: f.default for f in fields(settings) if f.name in left_out}
    return replace(settings, **defaults), {**sources, **dict.fromkeys(left_out, "default")}


def others_record(settings: ModelSettings, layers: list[Layer]) -> str | None:
    """The name of the layer that is the record of a run with another method; None without one."""
    for layer in layers:
        if layer.is_record and layer.values and resolve(type(settings), [layer])[0].technique != settings.technique:
            return layer.name
    return None


def environment_layer(kind: type, environment: Mapping[str, str]) -> Layer:
    """FTKIT_MODEL, FTKIT_SEED, ...: one variable for each option, upper case; an empty one counts as not set."""
    extras = {name: get_args(hint)[1:] for name, hint in get_type_hints(kind, include_extras=True).items()}
    variables = {
        field.name: f"FTKIT_{field.name.upper()}"
        for field in fields(kind)
        if all(getattr(extra, "environment", True) for extra in extras[field.name])
    }
    given = {name: variable for name, variable in variables.items() if environment.get(variable)}
    return Layer("environment", {name: environment[variable] for name, variable in given.items()}, given)


def field_types(kind: type) -> dict[str, Any]:
    """The bare type of each field of a settings dataclass, without its `Annotated` extras."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: get_args(h)[0] if get_origin(h := hints[f.name]) is Annotated else h for f in fields(kind)}


def unknown_key(name: str, layer: str, known: list[str]) -> UserError:
    """The error for a key that no option has."""
    near = did_you_mean(name, known)
    return UserError(
        f"{layer}: unknown setting '{name}'", ExitCode.USAGE, hint=f"{near}known: {', '.join(sorted(known))}"
    )


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
            raise UserError(
                f"{where} = {value!r} is not one of {allowed}",
                ExitCode.USAGE,
                hint=did_you_mean(str(value), list(map(str, get_args(wanted)))) or f"use {allowed}",
            )
        return value
    if origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [coerce(item, str, where) for item in items]
    if wanted is bool:
        return to_bool(value, where)
    if isinstance(value, (bool, list, dict)):
        raise wrong_type(value, wanted, where)
    if wanted is int and isinstance(value, float) and not value.is_integer():
        raise wrong_type(value, wanted, where)
    try:
        return wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong_type(value, wanted, where) from None


def to_bool(value: Any, where: str) -> bool:
    """True and False as TOML, YAML or the environment write them."""
    words = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
        "": False,
    }
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise wrong_type(value, bool, where)
    return words[str(value).lower()]


def wrong_type(value: Any, wanted: type, where: str) -> UserError:
    """The error for a value of the wrong type."""
    names = {
        int: ("a whole number", "16"),
        float: ("a number", "0.1 or 2e-4"),
        bool: ("true or false", "true"),
        str: ("text", '"one text"'),
    }
    name, example = names[wanted]
    return UserError(f"{where} = {value!r} should be {name}", ExitCode.USAGE, hint=f"for example {example}")


def describe(settings: Any, sources: Mapping[str, str]) -> list[str]:
    """Lines `name = value  # where it came from` for --print-config, readable as TOML."""
    lines = []
    names = [option.name for option in fields(settings)]
    unused = settings.unused(names) if isinstance(settings, ModelSettings) else {}
    for name in names:
        value = getattr(settings, name)
        is_set = f"{name} = {toml_value(value)}  # {sources[name]}"
        lines.append(
            f"# {name} is not set" if value is None else f"# {name} {unused[name][0]}" if name in unused else is_set
        )
    return lines


def toml_value(value: Any) -> str:
    """A setting as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


__all__ = ["Layer", "coerce", "describe", "environment_layer", "field_types", "flag_of", "resolve", "toml_value"]
