"""Write a synthetic table of products, shaped like the Red Dot product descriptions.

    python scripts/make_products.py reddot.csv --rows 1000 --seed 7

Every row is invented by a seeded grammar: no product, maker or text in it is real. Columns: product, category,
description, and text, which repeats the other three in one string as that data set does. The same seed gives the same
bytes; no product occurs twice, and none has a name that `build_tiny_corpus` could have used. `-` writes to stdout.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from random import Random

from product_text import Product, Side, describe, unique_products

COLUMNS = ("product", "category", "description", "text")


def make_row(rng: Random, product: Product) -> dict[str, str]:
    """The four columns of one product."""
    name, category, description = product.name, product.category.name, describe(rng, product)
    return {
        "product": name,
        "category": category,
        "description": description,
        "text": f"{category}: {name}. {description}",
    }


def make_rows(rows: int, seed: int) -> list[dict[str, str]]:
    """The whole table, one dictionary a row."""
    rng = Random(seed)
    return [make_row(rng, product) for product in unique_products(rng, rows, Side.PRODUCTS)]


def to_csv(rows: list[dict[str, str]]) -> str:
    """Header and rows as CSV text with Unix line ends."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("path", help="CSV file to write, or - for stdout")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(argv)
    if options.rows < 1:
        parser.error(f"--rows {options.rows}: at least one row is needed")
    table = to_csv(make_rows(options.rows, options.seed))
    if options.path == "-":
        sys.stdout.write(table)
    else:
        Path(options.path).write_text(table, encoding="utf-8", newline="")


if __name__ == "__main__":
    main()
