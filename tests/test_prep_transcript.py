"""docs/data.md shows what really comes out of each file of the test data, word by word."""

import json
import re
import subprocess

import pytest
from conftest import CHECKOUT, SHARED
from prep_shell import run_prep

DATA = SHARED / "data"
PAGE = (CHECKOUT / "docs/data.md").read_text(encoding="utf-8").partition("## Real files")[2]
SHOWN = [
    (typed, lines.splitlines())
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for typed, lines in re.findall(r"^\$ (.+)\n((?:(?!\$ ).+\n)*)", block, re.MULTILINE)
]


def words_of(command):
    """A command as the shell takes it apart."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_every_file_of_the_data_is_on_the_page():
    if not DATA.is_dir():
        pytest.skip("the test data is not here")
    files = [path for path in DATA.rglob("*.*") if path.is_file() and path.parent.name != "LICENSES"]
    typed = "\n".join(command for command, _ in SHOWN)
    missing = [str(path.relative_to(DATA)) for path in files if f"DATA/{path.relative_to(DATA)}" not in typed]
    assert [name for name in missing if name != "README.md"] == [] and len(SHOWN) >= 35


@pytest.mark.parametrize(("typed", "shown"), SHOWN, ids=[typed[:70] for typed, _ in SHOWN])
def test_what_the_page_shows_is_what_is_printed(monkeypatch, typed, shown):
    if not DATA.is_dir():
        pytest.skip("the test data is not here")
    before, _, command = typed.replace("DATA/", f"{DATA}/").rpartition("| ftkit prep ")
    stdin = subprocess.run(["bash", "-c", before], capture_output=True, text=True, check=True).stdout if before else ""
    result = run_prep(monkeypatch, CHECKOUT, words_of(command.removeprefix("ftkit prep ")), stdin)
    said = result.stderr.replace(f"{DATA}/", "DATA/").splitlines()
    printed = [line for line in said if not line.startswith("ftkit: warning: ")]
    if result.stdout:
        printed.append(first_row_as(shown[-1], result.stdout.partition("\n")[0]))
    assert printed == shown


def first_row_as(shown, row):
    """The first row as the page shows it: whole, its beginning, or its keys."""
    if re.fullmatch(r'\{"\w+"(, "\w+")*\}', shown):
        return "{" + ", ".join(json.dumps(key) for key in json.loads(row)) + "}"
    return row[: len(shown) - 3] + "..." if shown.endswith("...") else row
