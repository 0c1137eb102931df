"""Find a template by name or file, or the one that rows were made with by its fingerprint."""

from pathlib import Path

from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.template import Template, parse_template


def shipped_folder() -> Path:
    """The shipped templates: inside the installed package, or at the top of a checkout."""
    packaged = Path(__file__).parents[1] / "templates"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "templates"


def shipped_names() -> list[str]:
    """Names of the shipped templates."""
    return sorted(path.stem for path in shipped_folder().glob("*.toml"))


def load_template(name_or_file: str) -> Template:
    """A shipped template by its name, or one's own by its path (anything with a slash or .toml)."""
    path = Path(name_or_file)
    if path.suffix == ".toml" or "/" in name_or_file:
        return parse_template(read_template_text(path), str(path))
    if name_or_file not in shipped_names():
        near = did_you_mean(name_or_file, shipped_names())
        raise UserError(
            f"no template '{name_or_file}'",
            ExitCode.USAGE,
            hint=f"{near}shipped: {', '.join(shipped_names())}; or give a .toml file",
        )
    path = shipped_folder() / f"{name_or_file}.toml"
    return parse_template(path.read_text(encoding="utf-8"), str(path))


def read_template_text(path: Path) -> str:
    """The text of a template file of one's own."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file", ExitCode.USAGE, hint="--template takes a shipped name or a .toml file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", ExitCode.DATA) from None


def template_of_rows(fingerprint: str, given: Template | None) -> Template:
    """The template that rows name (`alpaca@<12 hex>`): the one given, or a shipped one with the same fingerprint.

    The name may be another's: only the hash decides. Neither matches: a data error that says what to type.
    """
    name = fingerprint.partition("@")[0]
    if given is not None:
        if given.fingerprint != fingerprint:
            raise UserError(
                f"the rows were made with template {fingerprint}, --template is {given.fingerprint}",
                ExitCode.DATA,
                hint="give the file that prep was given, or run prep again with this one",
            )
        return given
    if name in shipped_names():
        shipped = load_template(name)
        if shipped.fingerprint == fingerprint:
            return shipped
        raise UserError(
            f"the rows were made with template {fingerprint}, the one shipped here is {shipped.fingerprint}",
            ExitCode.DATA,
            hint=f"run ftkit prep again, or give the old file: --template {name}.toml",
        )
    raise UserError(
        f"the rows were made with a template of your own ({fingerprint})",
        ExitCode.DATA,
        hint=f"give it once more: --template {name}.toml",
    )
