"""Everything a person reads: words, tables and progress on stderr. The only user of rich."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

QUIET, NORMAL, VERBOSE = 0, 1, 2
_level = NORMAL


def set_level(level: int) -> None:
    """QUIET: errors only. NORMAL: what a person wants to know. VERBOSE: also the details."""
    global _level
    _level = level


def level() -> int:
    """The present level."""
    return _level


def info(text: str) -> None:
    """A line for the person at the terminal."""
    if _level >= NORMAL:
        write_line(text)


def detail(text: str) -> None:
    """A line that only -v shows."""
    if _level >= VERBOSE:
        write_line(text)


def warn(text: str) -> None:
    """A line that even -q does not hide: something is not as asked or expected."""
    write_line(f"ftkit: warning: {text}")


def error(message: str, hint: str | None = None) -> None:
    """`ftkit: error: ...` and the hint below it."""
    write_line(f"ftkit: error: {message}")
    if hint:
        write_line(f"  hint: {hint}")


def write_line(text: str, stream: IO[str] | None = None) -> None:
    """One line on stderr; a closed stderr must not stop the work."""
    stream = stream or sys.stderr
    if stream is None:
        return
    try:
        stream.write(safe(text, stream) + "\n")
        stream.flush()
    except (OSError, ValueError):
        pass


def faint(text: str) -> None:
    """A line that may be overlooked, such as the speed of an answer: dim on a terminal, unless NO_COLOR is set."""
    if _level < NORMAL:
        return
    if not is_terminal(sys.stderr):
        write_line(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(Text(safe(text, sys.stderr), style="dim"))


def safe(text: str, stream: IO[str]) -> str:
    """Text from data may hold terminal escapes and overrides of direction: kept in pipes, not on a terminal."""
    if not is_terminal(stream):
        return text
    return "".join(
        c
        for c in text
        if c in "\n\t"
        or (c.isprintable() and c not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
        or ord(c) > 0xFFFF
    )


def shortened(text: str, longest: int = 60) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def is_terminal(stream: IO[str] | None) -> bool:
    """True if a person looks at the stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def is_dumb() -> bool:
    """True if the terminal shows text, and nothing else is known of it."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


class Screen:
    """A text on stdout as it comes; on a terminal it can be drawn again at its end, as the Markdown that it is."""

    def __init__(self) -> None:
        self._text = ""
        self._size = shutil.get_terminal_size()

    def write(self, piece: str) -> None:
        """The next piece, at once."""
        self._text += (piece := safe(piece, sys.stdout))
        sys.stdout.write(piece)
        sys.stdout.flush()

    def end(self) -> None:
        """The end of its last line."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def draw_markdown(self) -> None:
        """Draw it again if it has any Markdown, and if all of it still stands where it was written.

        What has been scrolled away, or was broken otherwise since (a terminal of another size), stays as it is.
        """
        if is_dumb() or not is_terminal(sys.stdout) or not MARKDOWN.search(self._text):
            return
        rows = rows_of(self._text, self._size.columns)
        if rows >= self._size.lines or shutil.get_terminal_size() != self._size:
            return
        from rich.console import Console
        from rich.markdown import Markdown

        sys.stdout.write(f"\x1b[{rows}F\x1b[J")  # to the beginning of its first row, and clear from there
        sys.stdout.flush()
        Console(file=sys.stdout, highlight=False).print(Markdown(keep_lines(self._text.strip()), hyperlinks=False))


MARKDOWN = re.compile(r"^(#{1,6} |```|~~~|[-*+] |\d+[.)] |> |\|.*\|$)|\*\*\S|`[^`\n]+`", re.MULTILINE)
"""What tells Markdown from other text: headings, code, lists, quotes, tables, bold."""


def rows_of(text: str, columns: int) -> int:
    """Rows that a text takes on a terminal of so many columns."""
    from rich.cells import cell_len

    return sum(max(1, -(-cell_len(line.expandtabs()) // columns)) for line in text.split("\n"))


def keep_lines(text: str) -> str:
    """Markdown whose lines stay lines: it would join those of a paragraph. Code is left alone."""
    lines, in_code = [], False
    for line in text.split("\n"):
        in_code ^= line.lstrip().startswith(("```", "~~~"))
        lines.append(line if in_code or not line.strip() else line.rstrip() + "  ")
    return "\n".join(lines)


def side_by_side(texts: Mapping[str, str]) -> None:
    """Texts under their names on stdout: in columns, or one below the other where there is no room."""
    shown = {name: safe(text.strip(), sys.stdout) for name, text in texts.items()}
    if is_dumb() or not is_terminal(sys.stdout) or shutil.get_terminal_size().columns < NARROWEST * len(shown):
        sys.stdout.write("".join(f"{name}: {text}\n" for name, text in shown.items()))
        sys.stdout.flush()
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in shown:
        drawn.add_column(Text(name), ratio=1, overflow="fold")
    drawn.add_row(*map(Text, shown.values()))
    Console(file=sys.stdout, highlight=False).print(drawn)


NARROWEST = 24
"""Columns that a text side by side with others should have."""


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, to_stdout: bool = False, is_text: bool = False
) -> None:
    """A small table; the first column is text, the others are aligned to the right, unless all of them are text."""
    if _level < NORMAL and not to_stdout:
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(
        title=escape(title) or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_header=any(columns),
    )
    for place, name in enumerate(columns):
        drawn.add_column(escape(name), justify="left" if place == 0 or is_text else "right", overflow="fold")
    stream = sys.stdout if to_stdout else sys.stderr
    for row in rows:
        drawn.add_row(*(escape(safe(str(cell), stream)) for cell in row))
    Console(file=stream, width=None if is_terminal(stream) else 120, highlight=False, soft_wrap=False).print(drawn)


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, what: str, total: int | None, every_seconds: float = 10.0, done: int = 0) -> None:
        self.what, self.total, self.every_seconds = what, total, every_seconds
        self.done = done
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        if _level >= NORMAL and is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, note="")
            self._bar.start()
        return self

    def advance(self, by: int = 1, note: str = "") -> None:
        """Move on; `note` is shown behind the bar or on the line."""
        self.done += by
        if self._bar is not None:
            self._bar.update(self._task, advance=by, note=note)
        elif time.monotonic() - self._last >= self.every_seconds:
            self._last = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            info(f"{self.what}: {self.done}{of} {note}".rstrip())

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def silence_libraries() -> None:
    """Libraries warn and log on their own account; unless -v asks for it, only their errors come through.

    Called before they are imported: some log while they load (bitsandbytes about an optional package).
    """
    import logging
    import warnings

    if _level >= VERBOSE:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("transformers", "bitsandbytes", "peft", "accelerate", "torch", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """As `silence_libraries`, for as long as a block lasts: around calls whose warnings say nothing to the user."""
    import warnings

    with warnings.catch_warnings():
        if _level < VERBOSE:
            warnings.simplefilter("ignore")
        yield


def marked(pieces: Sequence[tuple[str, bool]]) -> None:
    """Text on stderr with its marked pieces shown: in colour on a terminal, between ⟦ and ⟧ elsewhere."""
    if _level < NORMAL:
        return
    if not is_terminal(sys.stderr):
        write_line("".join(f"⟦{text}⟧" if is_marked else text for text, is_marked in pieces))
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text()
    for text, is_marked in pieces:
        shown.append(safe(text, sys.stderr), style="bold green" if is_marked else "dim")
    Console(file=sys.stderr, highlight=False).print(shown)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line of block characters, averaged to at most `width` of them."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) / (high - low or 1) * 7)] for mean in means)
