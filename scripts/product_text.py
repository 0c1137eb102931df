"""Synthetic product prose from a seed: invented names, and sentences that suit a category.

Everything here is made up; `product_words` holds the vocabulary. Two writers share this file: `make_products` (the
table of products) and `build_tiny_corpus` (the pre-training text of the tiny model). Their names never meet: every
invented word belongs to one side by the parity of its hash, so a product of the table is new to the model.
"""

# ruff: noqa: SIM905 - word lists read better as one string
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import Any

from product_words import CATEGORIES, COLOURS, COMMON_ADJECTIVES, LOOKS, Category


class Side(IntEnum):
    """Who may use an invented word: the value is the parity of its hash."""

    CORPUS = 0
    PRODUCTS = 1


# ---------------------------------------------------------------- grammar


def with_article(phrase: str) -> str:
    """ "office chair" -> "an office chair"; by sound where letters mislead ("a useful", "an LED", "an honest")."""
    low = phrase.lower()
    if low.startswith(("honest", "hour")) or phrase.startswith("LED"):
        return f"an {phrase}"
    if low.startswith(("use", "uni", "one", "euro", "usb")):
        return f"a {phrase}"
    return f"{'an' if low[0] in 'aeiou' else 'a'} {phrase}"


def without_article(phrase: str) -> str:
    """ "a hidden switch" -> "hidden switch"."""
    return re.sub(r"^(an?|the) ", "", phrase)


def third_person(deed: str) -> str:
    """ "carry a load" -> "carries a load": the first word is the verb."""
    verb, _, rest = deed.partition(" ")
    if verb == "do" or verb.endswith(("s", "sh", "ch", "x", "z")):
        verb += "es"
    elif verb in ("have", "be"):
        verb = {"have": "has", "be": "is"}[verb]
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".strip().replace(" and open ", " and opens ").replace(" and close ", " and closes ")


def capitalise(text: str) -> str:
    """A capital for each sentence; what follows a closed quotation ('"Why?" asked Ida') is not a new one."""
    return re.sub(r'(^"?|[.?!] "?)([a-z])', lambda match: match[1] + match[2].upper(), text)


# ---------------------------------------------------------------- names

ONSETS = ("b d f g h j k l m n p r s t v w z " * 3 + "br cl dr fl gr kl kr pl qu sk sl st tr th sh ch x y c").split()
FIRST_ONSETS = [*ONSETS, *[""] * 6]
VOWELS = ("a e i o u " * 5 + "y ai au ea ei io ia").split()
INNER_CODAS = [*[""] * 12, *"l n r s m n r l".split()]
LAST_CODAS = "n r l s m x k t nd rn lt ns v st th".split()
ENDINGS = "a a o is en ix on um el ine ora eta ik us ia io ar ent e y ova ano il et".split()
SERIES = (
    "One Two Air Soft Pro Mini Plus Lite Max Pure Nova Duo Trio Go Flex Light Neo Classic Eco Active Studio Home "
    "Urban Compact Slim Edge Core Flow Move Line Solo Prime Touch Sense Play Wave Element Grand Junior X"
).split()
UNSEEMLY = re.compile(
    r"fuc|fuk|shit|cunt|nazi|rape|dick|cock|porn|sex|anus|anal|slut|tit|cum|fag|nig|arse|piss|pube|"
    r"whor|hitl|kkk|jew|retar|kill|dead|toxi|coon|turd|poo|pee|vagi|peni|"
    r"dyke|homo|paki|spic|negr|twat|wank|boob|butt|bitch|slav|nonce|mong|islam|allah|jesus"
)


# Real words that the syllables can spell; a name must be told from the prose around it.
REAL_WORDS = frozenset(
    re.findall(r"[a-z]+", " ".join(map(str, CATEGORIES)).lower())
    + [third_person(deed).split()[0] for category in CATEGORIES for deed in category.deeds]
    + [third_person(effect).split()[0] for category in CATEGORIES for _, effect in category.details]
    + [series.lower() for series in SERIES]
    + "broken chose cloth daily modern never pages please seven slate visit stand later table metal wagon".split()
)


def side_of_word(word: str) -> Side:
    """The side that an invented word belongs to, whatever its capitals: parity of the first byte of its sha256."""
    return Side(hashlib.sha256(word.lower().encode()).digest()[0] & 1)


def side_of(name: str) -> Side:
    """The side of a product name: that of its first word ("Velora 240" goes where "Velora" goes)."""
    return side_of_word(name.split()[0])


def invent_word(rng: Random, side: Side) -> str:
    """A pronounceable, capitalised word of 5 to 10 letters that belongs to `side`, e.g. "Velora"."""
    while True:
        onsets = (rng.choice(FIRST_ONSETS), rng.choice(ONSETS))[: rng.choice((1, 1, 2, 2, 2))]
        syllables = [onset + rng.choice(VOWELS) for onset in onsets]
        word = "".join(s + rng.choice(INNER_CODAS) for s in syllables[:-1]) + syllables[-1]
        if rng.random() < 0.6:
            word += rng.choice("lnrvtdmskbz") + rng.choice(ENDINGS)
        else:
            word += rng.choice(LAST_CODAS)
        if 5 <= len(word) <= 10 and word not in REAL_WORDS and _is_pronounceable(word) and side_of_word(word) == side:
            return word.capitalize()


def _is_pronounceable(word: str) -> bool:
    return not UNSEEMLY.search(word) and not re.search(r"[aeiouy]{3}|(.)\1|[^aeiouy]{4}", word)


def invent_name(rng: Random, side: Side) -> str:
    """A product name: mostly one invented word, at times with a series word, a number or a second word."""
    word, draw = invent_word(rng, side), rng.random()
    if draw < 0.52:
        return word
    if draw < 0.70:
        return f"{word} {rng.choice(SERIES)}"
    if draw < 0.80:
        return f"{word} {_series_number(rng)}"
    if draw < 0.86:
        return f"{word} {rng.choice('ABCDEFGHKLMNPRSTVXZ')}{rng.randint(1, 99)}"
    if draw < 0.92:
        return f"{word} {invent_word(rng, side)}"
    if draw < 0.96:
        return word.upper()
    return _camel_case(rng, side)


def _series_number(rng: Random) -> int:
    return rng.choice((rng.randint(2, 99), rng.randint(10, 99) * 10, rng.randint(1, 9) * 100, rng.randint(100, 999)))


def _camel_case(rng: Random, side: Side) -> str:
    """Two syllables, each with a capital, such as "LumTek"."""
    while True:
        halves = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice("lnrsmxkt") for _ in range(2)]
        word = "".join(halves)
        if _is_pronounceable(word) and len(word) >= 5 and side_of_word(word) == side:
            return "".join(half.capitalize() for half in halves)


# ---------------------------------------------------------------- a product and a voice that tells of it


@dataclass(frozen=True)
class Product:
    """A named thing with the facts that all sentences about it share."""

    name: str
    category: Category
    material: str
    colour: str
    weight_grams: int


def invent_product(rng: Random, side: Side) -> Product:
    """A product of any category with its name and facts."""
    category = rng.choice(CATEGORIES)
    return Product(
        invent_name(rng, side),
        category,
        rng.choice(category.materials),
        rng.choice(COLOURS),
        rng.randint(*category.weight_grams),
    )


class Voice:
    """Fills templates with the words of one product, and says nothing twice before all is said once.

    Fields: {name} {cat} {Cat} {a_cat} {short} {mat} {colour} {weight} stay the same; {adj} {a_adj}
    {look} {a_look} {deed} {deeds} {place} {users} {when} take the next phrase; {detail} and {its} take the next
    detail, which {effect} and {effect_b} go with.
    """

    def __init__(self, rng: Random, product: Product, **extra: str) -> None:
        category = product.category
        self.rng = rng
        self.product = product
        self.fixed = {
            "name": product.name,
            "cat": category.lower,
            "Cat": category.name,
            "short": category.short,
            "a_cat": with_article(category.lower),
            "mat": product.material,
            "colour": product.colour,
            "weight": weight_text(product.weight_grams),
            **extra,
        }
        self._decks: dict[str, Sequence[Any]] = {
            "adj": _adjectives(category, product.material),
            "look": LOOKS,
            "detail": category.details,
            "deed": category.deeds,
            "place": category.places,
            "users": category.users,
            "when": category.occasions,
        }
        self._left: dict[str, list[Any]] = {}
        self._effect = ""

    def _next(self, deck: str) -> Any:
        if not self._left.get(deck):
            cards = list(self._decks[deck])
            self._left[deck] = self.rng.sample(cards, len(cards))
        return self._left[deck].pop()

    def word(self, field: str) -> str:
        """The next value of one template field."""
        if field in self.fixed:
            return self.fixed[field]
        if field in ("detail", "its"):
            thing, self._effect = self._next("detail")
            return thing if field == "detail" else without_article(thing)
        if field in ("effect", "effect_b"):
            return third_person(self._effect) if field == "effect" else self._effect
        if field == "deeds":
            return third_person(self._next("deed"))
        if field in ("a_adj", "a_look"):
            return with_article(self._next(field[2:]))
        return str(self._next(field))

    def say(self, template: str) -> str:
        """One sentence (or line) from a template such as "The {name} is {a_adj} {cat}."."""
        return capitalise(re.sub(r"\{(\w+)\}", lambda match: self.word(match[1]), template))

    def say_some(self, templates: Sequence[str], count: int) -> list[str]:
        """`count` sentences from different templates."""
        return [self.say(template) for template in self.rng.sample(templates, count)]


def _adjectives(category: Category, material: str) -> tuple[str, ...]:
    """Every adjective once; none that the material already says ("light", "bright brass")."""
    words = dict.fromkeys(category.adjectives + COMMON_ADJECTIVES)
    return tuple(word for word in words if word not in material.split() and word not in category.lower.split())


def weight_text(grams: int) -> str:
    """Small weights in grams (to 5 g), the others in kilograms."""
    if grams < 1000:
        return f"{max(5, round(grams / 5) * 5)} g"
    return f"{grams / 1000:.1f} kg".replace(".0 kg", " kg") if grams < 10000 else f"{round(grams / 1000)} kg"


# ---------------------------------------------------------------- the description in the table of products

OPENINGS = (
    "The {name} is {a_adj} {cat} made of {mat} for {users}.",
    "{name} is {a_adj} {cat} that {deeds}.",
    "The {name} is {a_look} and {adj} {cat} that {deeds}.",
    "Designed for {users}, the {name} is {a_cat} that {deeds}.",
    "Made of {mat}, the {name} is {a_adj} {cat} for {users}.",
    "As {a_adj} {cat}, the {name} {deeds} and looks at home {place}.",
    "The {name} shows how {look} {a_cat} can be: it {deeds}.",
    "With the {name}, {users} receive {a_adj} {cat} made of {mat}.",
    "The {cat} {name} combines {mat} with {a_look} form.",
    "{a_look} silhouette in {mat} gives the {cat} {name} its character.",
    "{name} is the name of {a_adj} {cat} made of {mat}.",
    "Created for use {place}, the {name} is {a_adj} {cat} that {deeds}.",
)
# Sentences about details; they name neither the product nor its category, so any text can use them.
MIDDLES = (
    "{detail} {effect}, while {detail} {effect}.",
    "{detail} {effect}, and {detail} {effect}.",
    "It {deeds}, and {detail} {effect}.",
    "The {short} {deeds}, and its {its} {effect}.",
    "Two details stand out: {detail}, which {effect}, and {detail}, which {effect}.",
    "The {mat} looks {look}, and the {its} {effect}.",
    "It {deeds}, {deeds} and is easy to care for.",
    "Its {its} {effect}, so that nothing distracts from the {look} form.",
    "The {short} is {adj} in use: {detail} {effect}.",
    "A closer look reveals {detail}, which {effect}.",
    "Besides, the {short} {deeds}, and {detail} {effect}.",
    "{detail} {effect}; at the same time the {short} {deeds}.",
)
CLOSINGS = (
    "At home {place}, the {name} is {adj} and made to last.",
    "In this way, the {name} {deeds} and never draws attention to itself.",
    "The {name} is made for {users} and proves its worth {place}.",
    "{place}, the {name} looks {look} and self-assured.",
    "Thus the {name} {deeds} and pleases {users} day after day.",
    "With {a_look} design, the {name} is a reliable choice for {users}.",
    "The result is {a_adj} {short}: the {name} {deeds}.",
    "{users} will enjoy the {name} {place}.",
    "The {name} thus unites {a_look} appearance with a high degree of comfort.",
    "Whether {place} or {place}, the {name} is always {adj}.",
    "All in all, the {name} {deeds} and convinces with {a_look} design.",
)
DESCRIPTION_WORDS = range(35, 61)


def describe(rng: Random, product: Product) -> str:
    """A description in three sentences, 35 to 60 words, that names the product twice and its category."""
    return until(lambda: _three_sentences(rng, product), DESCRIPTION_WORDS)


def _three_sentences(rng: Random, product: Product) -> str:
    voice = Voice(rng, product)
    return " ".join(voice.say(rng.choice(part)) for part in (OPENINGS, MIDDLES, CLOSINGS))


def until(write: Callable[[], str], words: range) -> str:
    """Call `write` until its text has a number of words within `words`."""
    while True:
        text = write()
        if len(text.split()) in words:
            return text


def unique_products(rng: Random, count: int, side: Side) -> list[Product]:
    """`count` products, no name twice (capitals apart)."""
    products: dict[str, Product] = {}
    while len(products) < count:
        product = invent_product(rng, side)
        products.setdefault(product.name.lower(), product)
    return list(products.values())
