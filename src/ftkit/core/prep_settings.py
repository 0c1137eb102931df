"""The options of `ftkit prep`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ftkit.core.options import Argument, Option, flag_of, require, require_seed
from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class PrepSettings:
    """Turn tables, files of records, conversations or plain text into training rows (JSONL)."""

    inputs: Annotated[
        list[str],
        Argument(
            "CSV, TSV, JSON, JSONL, Parquet or text, also .gz or .zst; folders; hf:org/name:split; - is stdin; "
            "a.jsonl=0.7 mixes",
            "INPUT...",
        ),
    ] = ()  # type: ignore[assignment]
    template: Annotated[str | None, Option("A shipped template's name or a .toml file", metavar="NAME|FILE")] = None
    list_templates: Annotated[bool, Option("List the shipped templates and what they need, and leave")] = False
    map: Annotated[
        list[str],
        Option(
            "Fill a field of the template: output=description, instruction='Describe {product}'",
            metavar="FIELD=COLUMN|TEXT",
        ),
    ] = ()  # type: ignore[assignment]
    output: Annotated[
        str | None, Option("File for the rows (a folder with --split); stdout if absent", ("-o",), "PATH")
    ] = None
    split: Annotated[
        str | None, Option("Split by content hash: train=0.9,valid=0.1 (needs -o FOLDER)", metavar="NAME=SHARE,...")
    ] = None
    stratify: Annotated[
        str | None, Option("With --split: keep the shares within each value of this column", metavar="COLUMN")
    ] = None
    where: Annotated[
        str | None,
        Option("Keep the records for which this holds: \"lang == 'en' and stars|int > 3\"", metavar="EXPRESSION"),
    ] = None
    min_chars: Annotated[int | None, Option("Leave out rows with fewer characters in all their texts", metavar="N")] = (
        None
    )
    max_chars: Annotated[int | None, Option("Leave out rows with more characters in all their texts", metavar="N")] = (
        None
    )
    dedupe: Annotated[
        Literal["exact", "near", "none"],
        Option("Leave out rows that are equal to an earlier one, or nearly so (MinHash)"),
    ] = "exact"
    near: Annotated[
        float, Option("With --dedupe near: share of common word triples from which rows count as the same")
    ] = 0.8
    sample: Annotated[str | None, Option("Take this many rows at random, or this share of them", metavar="N|SHARE")] = (
        None
    )
    shuffle: Annotated[bool, Option("Put the rows in random order, also more than memory holds")] = False
    seed: Annotated[int, Option("Seed of --sample and --shuffle")] = 42
    tokenizer: Annotated[str | None, Option("Model whose tokenizer counts tokens", metavar="MODEL")] = None
    max_tokens: Annotated[int | None, Option("Longest row, in tokens of --tokenizer", metavar="N")] = None
    overlength: Annotated[Literal["drop", "truncate", "error"], Option("What a row beyond --max-tokens does")] = "drop"
    show: Annotated[
        int,
        Option(
            "Print the first N rows as the model sees them: trained tokens marked, a bar between tokens", metavar="N"
        ),
    ] = 0
    stats: Annotated[bool, Option("Print lengths, their histogram, labels and leaks between the parts of a split")] = (
        False
    )
    against: Annotated[
        str | None, Option("Warn of rows that are also in this file of rows (a test set)", metavar="FILE")
    ] = None
    strict: Annotated[
        bool, Option("Rows also found by --against, or longer than --max-tokens, are an error at the end")
    ] = False
    augment: Annotated[
        str | None,
        Option(
            "Pass each record through a Python function: a record in, a list of records out", metavar="FILE.py:FUNCTION"
        ),
    ] = None
    plain: Annotated[bool, Option("Leave ftkit's own keys (template, pattern, meta) out of the rows")] = False
    special_tokens: Annotated[
        Literal["keep", "reject"],
        Option("Text that looks like a special token: kept (trained as plain text), or a bad row"),
    ] = "keep"
    on_error: Annotated[Literal["stop", "skip"], Option("What a bad row does")] = "stop"
    rejects: Annotated[
        str | None, Option("With --on-error skip: write the rejected rows and reasons here", metavar="FILE")
    ] = None
    format: Annotated[Literal["auto", "csv", "json", "jsonl", "parquet", "text"], Option("Format of the input")] = (
        "auto"
    )
    encoding: Annotated[
        str | None, Option("Text encoding of the input; found by itself for UTF-8 and byte order marks")
    ] = None
    delimiter: Annotated[str | None, Option("Column delimiter of a table; found by itself", metavar="CHAR")] = None
    columns: Annotated[
        str | None, Option("Names of the columns of a table that has no line of them", metavar="NAME,...")
    ] = None
    no_header: Annotated[bool, Option("The table has no line of column names: columns are called 1, 2, 3")] = False
    skip_lines: Annotated[int, Option("Lines above the table that are no part of it", metavar="N")] = 0
    quoting: Annotated[
        Literal["standard", "none"], Option("none: a quote in a table is a character like any other")
    ] = "standard"
    records: Annotated[
        str | None, Option("Key (dotted: a.b) of the list of records inside a JSON object", metavar="KEY")
    ] = None
    documents: Annotated[
        Literal["file", "paragraph", "line"] | None,
        Option("Read plain text; a row is the whole file, a paragraph or a line"),
    ] = None
    turns: Annotated[
        str | None,
        Option(
            "Dialogues as plain text: what user and assistant turns begin with, as User:,Bot:", metavar="USER,ASSISTANT"
        ),
    ] = None
    max_field_bytes: Annotated[int, Option("Longest value accepted in a table")] = 10_000_000
    jobs: Annotated[int, Option("Processes that make the rows; the result is the same", metavar="N")] = 1
    shard: Annotated[
        str | None,
        Option(
            "Part I of N of the records, for array jobs: the parts are the whole; equal records are in one part, where "
            "--dedupe exact finds them",
            metavar="I/N",
        ),
    ] = None
    force: Annotated[bool, Option("Replace the output if it exists")] = False
    json: Annotated[bool, Option("Print the summary as one JSON object on stdout (rows then need -o)")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range or options that need another."""
        require(self.jobs >= 1, "--jobs", self.jobs, "1 or more")
        require(self.max_field_bytes >= 1, "--max-field-bytes", self.max_field_bytes, "1 or more")
        require(self.skip_lines >= 0, "--skip-lines", self.skip_lines, "0 or more")
        require(0 < self.near <= 1, "--near", self.near, "above 0, at most 1")
        require(self.max_tokens is None or self.max_tokens >= 2, "--max-tokens", self.max_tokens, "2 or more")
        require(self.show >= 0, "--show", self.show, "0 or more")
        require_seed(self.seed)
        if self.strict and not (self.against or self.max_tokens):
            hint = "give --against FILE, or --tokenizer MODEL --max-tokens N"
            raise UserError("--strict needs --against or --max-tokens", ExitCode.USAGE, hint=hint)
        for name, needed in (("stratify", "split"), ("max_tokens", "tokenizer")):
            if getattr(self, name) and not getattr(self, needed):
                raise UserError(
                    f"{flag_of(name)} needs {flag_of(needed)}", ExitCode.USAGE, hint=f"give {flag_of(needed)} too"
                )
