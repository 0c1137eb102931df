"""How an option is declared: its help, its names, and the words about a value out of range. Nothing heavy is imported."""

from dataclasses import dataclass

from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class Option:
    """How a field is typed on the command line: its help, extra names (`-o`), what stands for its value."""

    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    environment: bool = True
    """Whether the variable FTKIT_<NAME> sets it too."""


@dataclass(frozen=True)
class Argument:
    """A positional argument of a command."""

    help: str
    metavar: str


def flag_of(field_name: str) -> str:
    """`load_in_8bit` -> `--load-in-8bit`."""
    return "--" + field_name.replace("_", "-")


def require(holds: bool, flag: str, value: object, allowed: str) -> None:
    """Raise a usage error that names the flag, its value and the allowed range."""
    if not holds:
        raise UserError(f"{flag} {value} is out of range", ExitCode.USAGE, hint=f"{flag} takes {allowed}")


def require_seed(seed: int) -> None:
    """Seeds are what torch's generators take without folding two of them into one."""
    require(0 <= seed < 2**63, "--seed", seed, "0 up to 2^63 - 1")
