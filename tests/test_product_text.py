"""The synthetic product prose: seeded, fluent where a rule can tell, and with names that never meet."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import build_tiny_corpus  # noqa: E402
import corpus_documents  # noqa: E402
import make_products  # noqa: E402
import product_text  # noqa: E402
from product_text import Side, Voice  # noqa: E402
from product_words import CATEGORIES  # noqa: E402

ROWS = 500
DOCUMENTS = 2000
FORBIDDEN = (
    "### instruction",
    "### response",
    "### input",
    "### end",
    "below is an instruction",
    "write the description",
    "write a response",
    "product:",
    "category:",
    "description:",
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return make_products.make_rows(ROWS, seed=7)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(build_tiny_corpus.write_documents(DOCUMENTS, seed=1))


def run_script(name: str, *arguments: object) -> bytes:
    """Standard output of a script, run as the README does, under a random hash seed."""
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)], check=True, capture_output=True
    ).stdout


# ---------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("office chair", "an office chair"),
        ("table lamp", "a table lamp"),
        ("urban backpack", "an urban backpack"),
        ("useful form", "a useful form"),
        ("LED", "an LED"),
        ("honest pan", "an honest pan"),
    ],
)
def test_the_article_follows_the_sound(phrase, expected):
    assert product_text.with_article(phrase) == expected


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        ("cast a light", "casts a light"),
        ("carry books", "carries books"),
        ("stay dry", "stays dry"),
        ("catch dust", "catches dust"),
        ("do without cables", "does without cables"),
        ("open and close with one hand", "opens and closes with one hand"),
    ],
)
def test_a_deed_is_put_into_the_third_person(deed, expected):
    assert product_text.third_person(deed) == expected


def test_each_sentence_gets_a_capital_but_not_the_words_after_a_quotation():
    assert product_text.capitalise('"why?" asked Ida. families smiled.') == '"Why?" asked Ida. Families smiled.'


@pytest.mark.parametrize(
    ("grams", "expected"), [(16, "15 g"), (2, "5 g"), (1000, "1 kg"), (2149, "2.1 kg"), (38400, "38 kg")]
)
def test_weights_are_written_as_people_write_them(grams, expected):
    assert product_text.weight_text(grams) == expected


def test_a_voice_says_every_phrase_once_before_it_repeats_one():
    voice = Voice(Random(1), product_text.invent_product(Random(1), Side.CORPUS))
    details = voice.product.category.details
    assert sorted(voice.say("{its}") for _ in details) == sorted(
        product_text.capitalise(product_text.without_article(thing)) for thing, _ in details
    )


def test_an_effect_belongs_to_the_detail_named_before_it():
    voice = Voice(Random(2), product_text.invent_product(Random(2), Side.CORPUS))
    thing, effect = voice.say("{detail}|{effect_b}").split("|")
    assert (thing[0].lower() + thing[1:], effect) in voice.product.category.details


def test_there_are_many_categories_all_singular_and_every_detail_has_an_article():
    assert len(CATEGORIES) >= 24 and len({category.name for category in CATEGORIES}) == len(CATEGORIES)
    for category in CATEGORIES:
        assert not category.name.endswith("s"), category.name
        for thing, _ in category.details:
            article, noun = thing.split(" ", 1)
            assert product_text.with_article(noun) == f"{article} {noun}"


# ---------------------------------------------------------------- names


def test_names_are_many_and_mostly_new():
    rng = Random(3)
    names = [product_text.invent_name(rng, Side.CORPUS) for _ in range(5000)]
    assert len(set(names)) > 4900


@pytest.mark.parametrize("side", list(Side))
def test_every_invented_word_of_a_name_belongs_to_the_side_it_was_made_for(side):
    rng = Random(4)
    assert all(product_text.side_of(product_text.invent_name(rng, side)) == side for _ in range(2000))


def test_the_side_of_a_name_depends_on_its_first_word_and_not_on_capitals():
    assert product_text.side_of("Velora") == product_text.side_of("VELORA 240") == product_text.side_of("velora Soft")


def test_no_word_of_a_corpus_is_the_invented_word_of_a_product(rows, documents):
    corpus_words = set(re.findall(r"\w+", " ".join(documents).lower()))
    brands = {row["product"].split()[0].lower() for row in rows}
    assert not brands & corpus_words


# ---------------------------------------------------------------- the table of products


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_products(tmp_path):
    first = run_script("make_products.py", tmp_path / "a.csv", "--rows", 40, "--seed", 7)
    table = (tmp_path / "a.csv").read_bytes()
    assert first == b"" and table == run_script("make_products.py", "-", "--rows", 40, "--seed", 7)
    assert table != run_script("make_products.py", "-", "--rows", 40, "--seed", 8)


def test_the_csv_reads_back_as_the_rows_that_were_made(rows):
    assert list(csv.DictReader(io.StringIO(make_products.to_csv(rows)))) == rows
    assert list(rows[0]) == ["product", "category", "description", "text"]


def test_no_product_occurs_twice(rows):
    assert len({row["product"].lower() for row in rows}) == ROWS


def test_a_description_names_the_product_twice_and_its_category_in_lower_case(rows):
    for row in rows:
        assert row["description"].count(row["product"]) >= 2, row
        assert row["category"].lower() in row["description"], row


def test_a_description_has_35_to_60_words_in_two_or_three_sentences(rows):
    for row in rows:
        assert 35 <= len(row["description"].split()) <= 60
        assert 2 <= len(re.findall(r"[.!?](?: |$)", row["description"])) <= 3


def test_the_text_column_contains_the_values_of_the_others(rows):
    for row in rows:
        assert all(row[column] in row["text"] for column in ("product", "category", "description"))


def test_no_row_is_refused_for_a_count_of_none():
    result = subprocess.run(
        [sys.executable, SCRIPTS / "make_products.py", "-", "--rows", "0"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "at least one row" in result.stderr and result.stdout == ""


# ---------------------------------------------------------------- the corpus


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one(documents):
    lines = run_script("build_tiny_corpus.py", "-", "--documents", 30, "--seed", 1).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": text} for text in documents[:30]]
    assert list(build_tiny_corpus.write_documents(30, seed=2)) != documents[:30]


def test_the_corpus_does_not_know_the_form_of_an_instruction(documents):
    found = {phrase for text in documents for phrase in FORBIDDEN if phrase in text.lower()}
    assert not found


def test_every_document_has_40_to_250_words_and_none_occurs_twice(documents):
    assert all(40 <= len(text.split()) <= 250 for text in documents)
    assert len(set(documents)) == DOCUMENTS


@pytest.mark.parametrize("kind", list(corpus_documents.KINDS), ids=lambda kind: kind.__name__)
def test_every_kind_of_document_repeats_its_names(kind):
    repeated = 0
    for seed in range(20):
        text = kind(Random(seed))
        invented = [word for word in re.findall(r"[A-Z]\w{4,}", text) if product_text.side_of(word) == Side.CORPUS]
        repeated += any(invented.count(word) >= 2 for word in invented)
    assert repeated == 20


def test_prose_has_no_unfilled_field_doubled_word_or_wrong_article(rows, documents):
    for text in documents + [row["description"] for row in rows]:
        assert not re.search(r"[{}]|  |\b(\w+) \1\b", text), text
        assert not re.search(r"\b[Aa] [aeio][a-z]|\b[Aa]n [bcdfgjklmnpqrstvwxyz][a-z]", text), text
        assert not re.search(r"[.!?] [a-z]", text), text
