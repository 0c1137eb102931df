"""Write the pre-training text of the tiny model: synthetic product prose, one {"text": ...} a line.

    python scripts/build_tiny_corpus.py corpus.jsonl --documents 60000 --seed 1

Every document is invented from the seed and its own number, so the first 1,000 of 60,000 are the 1,000 of a smaller
corpus. The names in it never occur in `make_products`, whatever the seeds. `-` writes to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from corpus_documents import write_document


def write_documents(documents: int, seed: int) -> Iterator[str]:
    """`documents` texts; a string seeds each, because Random mixes it by a hash that is the same everywhere."""
    for number in range(documents):
        yield write_document(Random(f"ftkit corpus {seed} {number}"))


def to_line(text: str) -> str:
    """One JSONL line."""
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("path", help="JSONL file to write, or - for stdout")
    parser.add_argument("--documents", type=int, default=60000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    if options.documents < 1:
        parser.error(f"--documents {options.documents}: at least one is needed")
    lines = map(to_line, write_documents(options.documents, options.seed))
    if options.path == "-":
        sys.stdout.writelines(lines)
        return
    with Path(options.path).open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
