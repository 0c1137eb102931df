"""The kinds of documents in the pre-training text of the tiny model: synthetic product prose, one function a kind.

Each names its products several times, often far apart (an index first, the article later), so that a model learns to
copy a name it has never seen. None has the form of an instruction with an answer: that is left for tuning to teach.
"""

# ruff: noqa: SIM905 - word lists read better as one string
from __future__ import annotations

from collections.abc import Callable
from random import Random

from product_text import (
    MIDDLES,
    Product,
    Side,
    Voice,
    invent_product,
    invent_word,
    unique_products,
    until,
    weight_text,
    with_article,
)

DOCUMENT_WORDS = range(40, 251)

FIRST_NAMES = (
    "Anna Ben Clara David Elena Felix Greta Hugo Ida Jonas Karin Leo Mira Nils Olga Paul Rosa Simon Tessa "
    "Victor Wanda Yusuf Zoe Amir Lena Marco Ingrid Omar Priya Samuel Julia Tomas Agnes Henrik Laura"
).split()
MONTHS = "January February March April May June July August September October November December".split()
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# These name the product and its category ...
LEADS = (
    "The new {cat} from {studio} is called {name}.",
    "{name}: behind this name stands {a_adj} {cat} in {colour}.",
    "Anyone who looks for {a_adj} {cat} should see the {name}.",
    "There is something {look} about the {name}, {a_cat} made of {mat}.",
    "{studio} calls its latest {cat} {name}.",
    "A good {cat} should be {adj}, and the {name} is.",
    "When {designer} drew the {name}, {a_cat} for {users}, simplicity came first.",
    "The {cat} called {name} {deeds}.",
    "A product such as the {name} is rare in the category {Cat}.",
    "The description of the {name} in the catalogue is short: {a_adj} {cat} that {deeds}.",
    "Since {year}, the {name} has been the {cat} of choice for {users}.",
    "{place}, {a_cat} has to be {adj}; the {name} {deeds} as well.",
    "Made of {mat} and weighing {weight}, the {name} is {a_look} {cat}.",
    "The {name} is {a_cat} of the kind that {deeds}.",
    "{designer} of {studio} designed the {cat} {name} for {users}.",
    "The {name}, {a_adj} {cat} in {colour}, {deeds}.",
)
# ... these neither (MIDDLES are shared with the descriptions) ...
REMARKS = (
    *MIDDLES,
    "It is available in {colour} and weighs {weight}.",
    "Nothing about the {short} is superfluous: {detail} {effect}.",
    "One first notices {detail}, which {effect}.",
    "Those who use it daily praise {detail}, which {effect}.",
    "It {deeds}; it also {deeds}.",
    "{place} or {place}, it {deeds}.",
    "{users} and {users} alike value that it {deeds}.",
    "Its {look} lines hide {detail}, which {effect}.",
    "The {short} does not ask for attention; it simply {deeds}.",
    "For {users} there is one more reason: {detail} {effect}.",
    "It can {deed}, and it does so {place} as well.",
    "In {colour} the {short} looks {look}, while {detail} {effect}.",
    "{designer} chose {mat} because it suits the idea.",
    "The team at {studio} spent {number} months on {detail}.",
)
# ... and these the name alone.
FAREWELLS = (
    "The {name} costs {price} euros and is in the shops from {month}.",
    "Ask for the {name} at {shop} in {town}.",
    "It is easy to see why {users} like the {name}.",
    "The {name} will find friends {place}.",
    "{designer} has good reason to be proud of the {name}.",
    "Whoever has used the {name} {place} will not want to give it back.",
    "So the {name} does what a good {short} should do: it {deeds}.",
    "The {name} can be seen at {shop} until {month}.",
    "In short, the {name} is {a_adj} {short} that {deeds}.",
    "With the {name}, {studio} proves that {a_cat} can be both {adj} and {look}.",
    "In {town}, {users} already speak of the {name} with respect.",
    "{users} and {users} will both be happy with the {name}.",
)
PRAISE = (
    "The {name} {deeds}, just as {friend} had promised.",
    "I use the {name} {when}, and it {deeds}.",
    "What I like best is the {its}: it {effect}.",
    "My old {short} was nothing special; the {name} is {adj} and {look}.",
    "{friend} laughed when I bought {a_cat} for {price} euros, but now wants a {short} like it.",
    "I had not expected that {detail} would {effect_b}.",
    "After {number} months the {name} still looks {look}.",
    "The {mat} is even more {look} than in the picture.",
    "I use it {when}; {friend} uses it {when}.",
    "It should {deed}, and it really does.",
    "Even {friend}, who dislikes shopping, finds the {name} {adj}.",
    "The {colour} is a little darker than in the picture, but {look}.",
)


def person(rng: Random) -> str:
    """A first name and an invented surname."""
    return f"{rng.choice(FIRST_NAMES)} {invent_word(rng, Side.CORPUS)}"


def order_code(rng: Random) -> str:
    """Something like "KX-4821": letters and digits to copy."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(('-', ' ', ''))}{rng.randint(10, 99999)}"


def voices(rng: Random, count: int) -> list[Voice]:
    """Voices for `count` products that live in one document: same town, people and month."""
    scene = {
        "designer": person(rng),
        "studio": _studio(rng),
        "town": invent_word(rng, Side.CORPUS),
        "shop": _shop(rng),
        "month": rng.choice(MONTHS),
        "friend": rng.choice(FIRST_NAMES),
        "number": rng.choice(NUMBERS[1:]),
        "year": str(rng.randint(1988, 2024)),
    }
    return [_voice(rng, product, scene) for product in unique_products(rng, count, Side.CORPUS)]


def _voice(rng: Random, product: Product, scene: dict[str, str]) -> Voice:
    return Voice(rng, product, **scene, price=str(rng.randint(12, 390)))


def _studio(rng: Random) -> str:
    word = invent_word(rng, Side.CORPUS)
    return rng.choice((f"Studio {word}", f"{word} Design", f"{word} & Sons", f"{word}", f"Atelier {word}"))


def _shop(rng: Random) -> str:
    word = invent_word(rng, Side.CORPUS)
    return rng.choice((f"the {word} store", f"the house of {word}", f"{word} Living", f"the {word} museum"))


def article(voice: Voice, remarks: int) -> str:
    """A short article: it opens with name and category, goes into detail, and ends with the name."""
    rng = voice.rng
    return " ".join([voice.say(rng.choice(LEADS)), *voice.say_some(REMARKS, remarks), voice.say(rng.choice(FAREWELLS))])


def listing(phrases: list[str]) -> str:
    """ "a, b and c"."""
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}" if len(phrases) > 1 else phrases[0]


def titled(voice: Voice) -> str:
    """Name and category as a title, in one of many ways."""
    return voice.say(
        voice.rng.choice(
            (
                "{name}",
                "{Cat} {name}",
                "{name} {Cat}",
                "{name} - {Cat}",
                "{name}, {cat}",
                "{Cat}: {name}",
                "The {name} {cat}",
                "{name} ({cat})",
                "The {cat} {name}",
                "{Cat} / {name}",
                "New: {name}, {a_cat}",
                '"{name}"',
            )
        )
    )


# ---------------------------------------------------------------- one product


def catalogue_page(rng: Random) -> str:
    """A title and an article."""
    [voice] = voices(rng, 1)
    body = article(voice, rng.randint(1, 6))
    return f"{titled(voice)}\n{body}" if rng.random() < 0.7 else body


def review(rng: Random) -> str:
    """What a buyer says, in the first person."""
    [voice] = voices(rng, 1)
    start = rng.choice(
        (
            "I bought the {name} in {month}.",
            "The {name} is my {ordinal} {cat}.",
            "{friend} gave me the {name} for my birthday.",
            "I have owned the {name} for {number} weeks.",
            "My {cat} is called {name}.",
            "We needed {a_cat} and chose the {name}.",
        )
    )
    end = rng.choice(
        (
            "I would buy the {name} again.",
            "{stars} stars for the {name}.",
            "Thank you, {studio}, for the {name}.",
            "In the end I can only recommend the {name}.",
            "The {name} stays with us.",
            "For {price} euros the {name} is a good {cat}.",
        )
    )
    voice.fixed |= {"ordinal": rng.choice(ORDINALS), "stars": rng.choice(("Three", "Four", "Five"))}
    lines = [voice.say(start), *voice.say_some(PRAISE, rng.randint(3, 6)), voice.say(end)]
    title = rng.choice(
        ("", f"{titled(voice)}\n", voice.say("My {name}\n"), voice.say("Review of the {name} by {friend}\n"))
    )
    return title + " ".join(lines)


def press_note(rng: Random) -> str:
    """Place and date, news, a quotation."""
    [voice] = voices(rng, 1)
    voice.fixed["day"] = str(rng.randint(1, 30))
    start = voice.say(
        rng.choice(
            (
                "{town}, {day} {month} {year}. {studio} presents the {name}, {a_adj} {cat}.",
                "{studio} will show its new {cat} in {town} this {month}. Its name is {name}.",
                "PRESS RELEASE\n{town} - From {month}, the {cat} {name} by {studio} is in the shops.",
            )
        )
    )
    quote = voice.say(
        rng.choice(
            (
                '"We wanted {a_cat} that is {adj}," says {designer}. "The {name} is {look} as well."',
                '"With the {name} we thought of {users}," {designer} explains.',
                '{designer}, who designed the {name}, adds: "It should {deed}. That was our aim."',
            )
        )
    )
    end = voice.say(
        rng.choice(
            (
                "The {name} costs {price} euros.",
                "Pictures of the {name} can be had from {studio}.",
                "{studio} will deliver the {name} from {month}.",
            )
        )
    )
    return " ".join([start, *voice.say_some(REMARKS, rng.randint(1, 3)), quote, end])


def shop_window(rng: Random) -> str:
    """A short text that sells."""
    [voice] = voices(rng, 1)
    start = rng.choice(
        (
            "Look what has arrived: the {name}!",
            "Now in our window: the {cat} {name}.",
            "Only in {month}: the {name} for {price} euros.",
            "Have you met the {name}?",
        )
    )
    end = rng.choice(
        (
            "Come in and try the {name}.",
            "The {name} is waiting for you at {shop}.",
            "Your {cat}, your {name}.",
            "{name}. {price} euros. Only at {shop} in {town}.",
        )
    )
    offer = rng.choice(
        ("It is {a_adj} {cat} made of {mat}.", "This {cat} {deeds}.", "{a_adj} {cat} in {colour} for {users}.")
    )
    return " ".join([voice.say(start), voice.say(offer), *voice.say_some(REMARKS, rng.randint(2, 3)), voice.say(end)])


def letter(rng: Random) -> str:
    """Subject, greeting, some praise, a question."""
    [voice] = voices(rng, 1)
    writer, reader = person(rng), rng.choice(FIRST_NAMES)
    subject = voice.say(
        rng.choice(
            (
                "Subject: your {cat} {name}",
                "Subject: {name}",
                "Re: {name} ({cat})",
                "Subject: a question about the {name} {cat}",
                "About the {name}, my new {cat}",
            )
        )
    )
    start = voice.say(
        rng.choice(
            (
                "thank you for the {name}, which came in {month}.",
                "I am writing to you about the {name}.",
                "some weeks ago I bought your {cat} {name} at {shop}.",
                "you asked me how I like the {name}.",
            )
        )
    )
    question = voice.say(
        rng.choice(
            (
                "Can you tell me whether the {name} comes in other colours than {colour}?",
                "Do you know if the {name} may stand {place}?",
                "Please send a second {name} to my sister in {town}.",
                "Is there a smaller {cat} than the {name}?",
                "When you visit us in {town}, I will show you the {name}.",
            )
        )
    )
    praise = " ".join(voice.say_some(PRAISE, rng.randint(2, 4)))
    wish = rng.choice(("Yours,", "Kind regards,", "With best wishes,", "Warmly,"))
    return f"{subject}\n\nDear {reader},\n\n{start} {praise} {question}\n\n{wish}\n{writer}"


def jury_statement(rng: Random) -> str:
    """Why a design won an award."""
    [voice] = voices(rng, 1)
    head = rng.choice(
        (
            "Statement by the jury\n",
            "Statement of the jury on the {cat} {name}\n",
            "{name}\nThe jury writes:\n",
            "",
            "Award of the year: {name} by {studio}\n",
        )
    )
    start = rng.choice(
        (
            "The {name} convinced the jury as {a_adj} {cat}.",
            "In the {name}, {mat} becomes {a_look} {cat}.",
            "The {cat} {name} won the jury over with its {look} form.",
            "The design of the {name} rethinks the {cat}.",
            "The winner in the category {Cat} is the {name} by {studio}.",
            "Among all products in the category {Cat}, the {name} is the most {look}.",
        )
    )
    end = rng.choice(
        (
            "The jury congratulates {designer} on the {name}.",
            "The {name} is {look}, {adj} and worthy of the award.",
            "For this, {studio} receives the award for the {name}.",
            "The {name} sets a standard for {users}.",
        )
    )
    return voice.say(head) + " ".join([voice.say(start), *voice.say_some(REMARKS, rng.randint(2, 5)), voice.say(end)])


def markdown_page(rng: Random) -> str:
    """A title and sections under headings."""
    [voice] = voices(rng, 1)
    sections = rng.sample(
        (
            ("Details", "{detail} {effect}. {detail} {effect}."),
            ("In use", "I use the {name} {when}. It {deeds}."),
            ("Material", "The {name} is made of {mat}. The {mat} looks {look}."),
            ("Idea", "{designer} wanted {a_cat} for {users}."),
            ("Who it is for", "The {name} is for {users} and {users}."),
            ("Where to buy", "The {name} is sold at {shop} in {town}."),
            ("Why {name}?", "Because the {short} {deeds} and {deeds}."),
            ("About {studio}", "{studio} made the {name} with {users} in mind."),
            ("Place", "The {name} looks good {place} and {place}."),
        ),
        rng.randint(2, 4),
    )
    mark = rng.choice(("##", "##", "###"))
    parts = [f"{mark[1:]} {titled(voice)}\n\n{article(voice, rng.randint(0, 2))}"]
    parts += [f"{mark} {voice.say(head)}\n\n{voice.say(body)}" for head, body in sections]
    return "\n\n".join(parts)


def spec_lines(voice: Voice) -> list[str]:
    """Facts with labels, such as "Weight: 2 kg"."""
    rng = voice.rng
    lines = rng.sample(
        (
            "Material: {mat}",
            "Weight: {weight}",
            "Colour: {colour}",
            "Price: {price} euros",
            "Maker: {studio}",
            "Designer: {designer}",
            "Year: {year}",
            "For: {users}",
            "Place: {place}",
            "Special: {detail}",
        ),
        rng.randint(3, 6),
    )
    return [voice.say(line) for line in lines]


def spec_sheet(rng: Random) -> str:
    """A title, an article and facts, the last two in either order."""
    [voice] = voices(rng, 1)
    lines, join = spec_lines(voice), rng.choice(("\n", "; ", "\n- "))
    facts = ("- " if join == "\n- " else "") + join.join(lines)
    body = article(voice, rng.randint(1, 3))
    if rng.random() < 0.5:
        return f"{titled(voice)}\n\n{body}\n\n{facts}"
    return f"{titled(voice)}\n\n{facts}\n\n{body}"


def interview(rng: Random) -> str:
    """Questions to a designer, and answers."""
    [voice] = voices(rng, 1)
    pairs = rng.sample(
        (
            (
                "Why is the {cat} called {name}?",
                "{name} is a word that my daughter invented. It fits a {short} that {deeds}.",
            ),
            ("What is new about the {name}?", "It has {detail}, which {effect}."),
            ("Who will buy the {name}?", "I think of {users}, and of {users}."),
            ("Why {mat}?", "It is honest, and it makes the {name} {look}."),
            ("Where do you use the {name} yourself?", "Mostly {place}. There the {short} {deeds}."),
            ("What was difficult?", "The {its}. Now it {effect}, but it took {number} years."),
            ("What comes after the {name}?", "A holiday in {town}."),
        ),
        rng.randint(3, 5),
    )
    start = voice.say(
        rng.choice(
            (
                "{designer} is the designer of the {name}, {a_adj} {cat}. We met in {town}.",
                "We spoke with {designer} about the {cat} {name}.",
            )
        )
    )
    lines = [f"- {voice.say(question)}\n- {voice.say(answer)}" for question, answer in pairs]
    return start + "\n" + "\n".join(lines)


def manual(rng: Random) -> str:
    """Advice on use and care."""
    [voice] = voices(rng, 1)
    advice = rng.sample(
        (
            "Clean the {name} with a soft cloth.",
            "The {mat} does not like salt water.",
            "Keep this sheet near the {name}.",
            "Note that {detail} {effect}.",
            "The {its} {effect}; please do not remove it.",
            "If the {short} is damaged, write to {studio} in {town}.",
            "The {name} weighs {weight}, so lift it with care.",
            "Used {place}, the {name} needs to be dried from time to time.",
            "Treated with care, the {short} {deeds}.",
            "Spare parts for the {name} are kept for {number} years.",
        ),
        rng.randint(5, 7),
    )
    start = voice.say(
        rng.choice(
            (
                "Thank you for choosing the {cat} {name}.",
                "Your {name} is {a_adj} {cat} made of {mat}.",
                "Before first use of the {name}",
            )
        )
    )
    lines = [voice.say(line) for line in advice]
    if rng.random() < 0.5:
        return start.rstrip(".") + ".\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
    return f"{start.rstrip('.')}.\n" + " ".join(lines)


# ---------------------------------------------------------------- several products


def comparison(rng: Random) -> str:
    """Two products of one category, sentence by sentence."""
    first, second = voices(rng, 2)
    second = _same_category(rng, first, second)
    start = rng.choice(
        (
            "{name} or {other}? Both are {adj}.",
            "{name} against {other}: a test of two products for {users}.",
            "We compared the {cat} {name} with the {cat} {other}.",
            "Two of a kind: {name} and {other}.",
        )
    )
    first.fixed["other"], second.fixed["other"] = second.product.name, first.product.name
    contrast = (
        "The {name} is made of {mat} and weighs {weight}.",
        "The {name} {deeds}.",
        "The {name} has {detail}, which {effect}.",
        "The {name} is better {place}.",
        "The {name} looks {look}.",
        "The {name} costs {price} euros.",
        "As {a_cat}, the {name} is {adj}.",
    )
    lines = []
    for template in rng.sample(contrast, rng.randint(2, 4)):
        lines += [first.say(template), second.say(template)]
    winner = rng.choice((first, second))
    end = winner.say(
        rng.choice(
            (
                "In the end the {name} wins, because it {deeds}.",
                "We liked the {name} more than the {other}.",
                "Our choice is the {name}; the {other} comes second.",
                "The {name} is more {look} than the {other}.",
            )
        )
    )
    return " ".join([first.say(start), *lines, end])


def _same_category(rng: Random, first: Voice, second: Voice) -> Voice:
    """`second` again, as another product of the category of `first`."""
    category = first.product.category
    product = Product(
        second.product.name,
        category,
        rng.choice(category.materials),
        second.product.colour,
        rng.randint(*category.weight_grams),
    )
    return _voice(rng, product, {key: value for key, value in second.fixed.items() if key in SCENE})


SCENE = ("designer", "studio", "town", "shop", "month", "friend", "number", "year")


def index_page(rng: Random) -> str:
    """A sentence that announces all products, then an article each."""
    tellers = voices(rng, rng.randint(2, 4))
    style = rng.choice(
        ("the {name} {cat}", "the {cat} {name}", "{name} ({cat})", "{a_cat} called {name}", "{name}, {a_cat}")
    )
    names = [teller.say(style) for teller in tellers]
    names = [name[0].lower() + name[1:] if not style.startswith("{name}") else name for name in names]
    join = "; ".join(names) if style == "{name}, {a_cat}" else listing(names)
    start = rng.choice(
        (
            "In this issue: {}.",
            "This week we look at {}.",
            "Contents: {}.",
            f"New in {rng.choice(MONTHS)}: {{}}.",
            "On the following pages you will find {}.",
            "Today's guests are {}.",
            "Our editors chose {}.",
        )
    )
    heading = rng.random() < 0.4
    articles = [
        (f"{teller.product.name}\n" if heading else "") + article(teller, rng.randint(0, 1)) for teller in tellers
    ]
    return "\n\n".join([start.format(join), *articles])


def numbered_index(rng: Random) -> str:
    """A list of products, then an article each."""
    tellers = voices(rng, rng.randint(2, 4))
    mark = rng.choice(("{}. ", "({}) ", "No. {}: ", "Page {}: ", "- ", "* "))
    row = rng.choice(("{name}, {cat}", "{Cat} {name}", "{name} - {a_cat}", "{name} ({Cat})", "{Cat}: {name}"))
    rows = [mark.format(number) + teller.say(row) for number, teller in enumerate(tellers, 1)]
    title = rng.choice(
        ("Contents", "Our list", "Winners", "New in the shop", "Wish list", "The best of {year}", "Gifts")
    )
    bodies = [
        (mark.format(number) if rng.random() < 0.3 else "") + article(teller, rng.randint(0, 1))
        for number, teller in enumerate(tellers, 1)
    ]
    return tellers[0].say(title) + "\n" + "\n".join(rows) + "\n\n" + "\n".join(bodies)


def raffle(rng: Random) -> str:
    """Prizes and winners, told twice in different order."""
    tellers, winners = voices(rng, rng.randint(2, 3)), []
    lines = []
    for ordinal, teller in zip(ORDINALS, tellers, strict=False):
        winners.append(person(rng))
        teller.fixed |= {"winner": winners[-1], "ordinal": ordinal}
        lines.append(teller.say("{ordinal} prize, the {cat} {name}, goes to {winner}."))
    for teller in rng.sample(tellers, len(tellers)):
        lines.append(
            teller.say(
                rng.choice(
                    (
                        "{winner}, who won the {name}, said that it {deeds}.",
                        "The {name} is now in the hands of {winner}.",
                        "{winner} will use the {name} {place}.",
                        '"I needed {a_cat}," said {winner} about the {name}.',
                    )
                )
            )
        )
        lines.append(teller.say(rng.choice(REMARKS)))
    return " ".join([tellers[0].say("The winners of the raffle at {shop} are known."), *lines])


def stock_list(rng: Random) -> str:
    """Where things stand, and a talk in which the list is read again."""
    tellers = voices(rng, rng.randint(3, 5))
    places = rng.sample(range(1, 60), len(tellers))
    word, into = rng.choice((("Shelf", "on"), ("Box", "in"), ("Room", "in"), ("Row", "in"), ("Table", "on")))
    rows = [teller.say(f"{word} {place}: " + "{name}, {cat}") for place, teller in zip(places, tellers, strict=True)]
    asker, clerk = rng.sample(FIRST_NAMES, 2)
    talk = []
    for index in rng.sample(range(len(tellers)), 2):
        teller, place = tellers[index], f"{word.lower()} {places[index]}"
        talk.append(
            teller.say(
                rng.choice(
                    (
                        f'"Where is the {{name}}?" asked {asker}. "The {{cat}}? {into} {place}," said {clerk}.',
                        f'{asker} wanted to see {{a_cat}}. "Look at {place}," said {clerk}, "there is the {{name}}."',
                        f'"What is {into} {place}?" asked {asker}. "The {{name}}, {{a_adj}} {{cat}}," said {clerk}.',
                    )
                )
            )
        )
        talk.append(teller.say(rng.choice(REMARKS)))
    return "\n".join(rows) + "\n\n" + " ".join(talk)


def delivery_note(rng: Random) -> str:
    """An order with its code, then a letter that repeats it."""
    tellers, code = voices(rng, rng.randint(2, 3)), order_code(rng)
    buyer = person(rng)
    rows = [
        f"{rng.randint(1, 20)} x {teller.say(rng.choice(('{name} ({cat})', '{Cat} {name}', '{name} in {colour}')))}"
        for teller in tellers
    ]
    lines = [tellers[0].say(f"Dear {buyer}, your order {code} left {{town}} in {{month}}.")]
    for teller in tellers:
        lines.append(
            teller.say(
                rng.choice(
                    (
                        "The {name} is packed in paper.",
                        "The {cat}, our {name}, comes in {colour}.",
                        "The {name} {deeds}.",
                        "With the {name} you will find {detail}; it {effect}.",
                        "You chose the {name}, {a_cat} made of {mat}.",
                    )
                )
            )
        )
    end = f"Please name order {code} when you write to us."
    return f"Order {code}\n" + "\n".join(rows) + "\n\n" + " ".join([*lines, end])


def table_of_facts(rng: Random) -> str:
    """A table, and sentences that read from it."""
    tellers = voices(rng, rng.randint(2, 4))
    columns = [
        ("Name", "{name}"),
        *rng.sample(
            (("Kind", "{Cat}"), ("Colour", "{colour}"), ("Weight", "{weight}"), ("Euros", "{price}")), rng.randint(2, 3)
        ),
    ]
    rng.shuffle(columns)
    rows = [" | ".join(head for head, _ in columns)]
    rows += [
        " | ".join(
            teller.say(field) if field in ("{name}", "{Cat}") else teller.word(field[1:-1]) for _, field in columns
        )
        for teller in tellers
    ]
    body = []
    for teller in rng.sample(tellers, len(tellers)):
        body.append(
            teller.say(
                rng.choice(
                    (
                        "The {name} is {a_adj} {cat} in {colour}.",
                        "The {name} weighs {weight} and costs {price} euros.",
                        "{colour} is the colour of the {cat} {name}.",
                        "{price} euros is the price of the {cat} {name}.",
                    )
                )
            )
        )
        body.append(teller.say(rng.choice(REMARKS)))
    return "\n".join(f"| {row} |" for row in rows) + "\n\n" + " ".join(body)


def exhibition_tour(rng: Random) -> str:
    """Room after room, and back to one of them."""
    tellers = voices(rng, rng.randint(2, 4))
    lines = [tellers[0].say(rng.choice(("Welcome to {shop} in {town}.", "A walk through {shop} begins at the door.")))]
    for ordinal, teller in zip(ORDINALS, tellers, strict=False):
        lines.append(
            teller.say(
                rng.choice(
                    (
                        f"In the {ordinal} room stands the {{name}}, {{a_adj}} {{cat}} by {{designer}}.",
                        f"The {ordinal} room belongs to the {{cat}} {{name}}.",
                        f"The {ordinal} room shows the {{name}}, {{a_cat}} made of {{mat}}.",
                    )
                )
            )
        )
        lines += teller.say_some(REMARKS, rng.randint(0, 2))
    back = rng.choice(tellers)
    lines.append(
        back.say(
            rng.choice(
                (
                    "Many visitors go back to the {name}.",
                    "The {name} is the one that children remember.",
                    "On leaving, everyone speaks of the {name}.",
                )
            )
        )
    )
    return " ".join(lines)


def newsletter(rng: Random) -> str:
    """A greeting that names all products, then each in turn."""
    tellers = voices(rng, rng.randint(2, 3))
    names = listing([f"the {teller.product.name}" for teller in tellers])
    greeting = rng.choice(
        (
            f"Dear friends, this month we have news of {names}.",
            f"Good morning! Today it is all about {names}.",
            f"Hello from {_shop(rng)}. We have unpacked {names}.",
        )
    )
    parts = [
        teller.say(
            rng.choice(
                (
                    "The {name} is {a_look} {cat}. It {deeds}.",
                    "First things first: the {cat} {name} {deeds}.",
                    "Do you know the {name}? This {cat} has {detail}, which {effect}.",
                    "The {name} is back. {users} love the {cat}.",
                )
            )
        )
        + " "
        + teller.say(rng.choice(REMARKS))
        for teller in tellers
    ]
    return (
        f"{greeting}\n\n"
        + "\n".join(parts)
        + "\n\n"
        + rng.choice(("See you soon,", "Until next month,", "Yours,"))
        + f"\n{person(rng)}"
    )


def shop_story(rng: Random) -> str:
    """A small scene with dialogue: everyday language beside the catalogue's."""
    [voice] = voices(rng, 1)
    buyer, seller = rng.sample(FIRST_NAMES, 2)
    voice.fixed |= {"buyer": buyer, "seller": seller}
    start = rng.choice(
        (
            "It was raining in {town} when {buyer} entered the shop.",
            "{buyer} had walked past the shop in {town} for weeks.",
            "On the first day of {month}, {buyer} went to {town} to buy {a_cat}.",
            "The old {cat} was broken, and {buyer} needed a new one.",
        )
    )
    scene = [
        rng.choice(
            (
                '"Good morning," said {seller}. "May I help you?"',
                "{seller} looked up from the newspaper and smiled.",
                '"What are you looking for?" asked {seller}.',
            )
        ),
        rng.choice(
            (
                '"I would like {a_adj} {cat}," said {buyer}.',
                '"Do you have {a_cat} made of {mat}?" asked {buyer}.',
                '"I have read about {a_cat} called {name}," said {buyer}.',
            )
        ),
        rng.choice(
            (
                '"Then take the {name}," said {seller}. "It {deeds}."',
                '"You mean the {name}. It has {detail}, which {effect}."',
                "{seller} went to the back and returned with the {name}.",
            )
        ),
        rng.choice(
            (
                '"How much is the {name}?" - "{price} euros."',
                '"Who made the {name}?" - "{designer}, in {town}."',
                '"Is the {name} heavy?" - "It weighs {weight}."',
                '"Does the {name} come in {colour}?" - "Yes, of course."',
            )
        ),
        rng.choice(
            (
                "{buyer} held the {name} for a while and thought of home.",
                "Outside the rain had stopped.",
                "{buyer} paid, and {seller} wrapped the {name} in brown paper.",
            )
        ),
        rng.choice(
            (
                "That evening the {name} stood in its new home.",
                '"I will call it simply the {name}," said {buyer}.',
                "Ever since, {buyer} has used the {name} {place}.",
                "A week later {buyer} came back and bought a second {name}.",
            )
        ),
    ]
    return " ".join([voice.say(start), *(voice.say(line) for line in scene)])


def word_game(rng: Random) -> str:
    """Lists of invented words said again: copying for its own sake."""
    words = [invent_word(rng, Side.CORPUS) for _ in range(rng.randint(4, 8))]
    first, second = rng.sample(FIRST_NAMES, 2)
    picked = rng.sample(words, 2)
    [voice] = voices(rng, 1)
    return (
        f"{first} and {second} were looking for a name for {with_article(voice.product.category.lower)}. "
        f"{first} wrote down: {', '.join(words)}. {second} read aloud: {', '.join(words)}. "
        f'"I like {picked[0]}," said {first}. "And I like {picked[1]}," said {second}. '
        + voice.say("In the end they called the {cat} {name}. ")
        + voice.say(voice.rng.choice(REMARKS))
        + " "
        + voice.say(f"Today everyone in {{town}} knows the {{name}}; {words[0]} and {words[-1]} are forgotten.")
    )


def two_finds(rng: Random) -> str:
    """Two products seen at once; the second comes back at the end."""
    [voice] = voices(rng, 1)
    product = invent_product(rng, Side.CORPUS)
    voice.fixed |= {
        "other": product.name,
        "a_other": with_article(product.category.lower),
        "other_weight": weight_text(product.weight_grams),
    }
    lines = (
        "At {shop} in {town} I saw two things I had never seen before.",
        "One was the {name}, {a_adj} {cat} made of {mat}; the other was the {other}, {a_other}.",
        rng.choice(REMARKS),
        rng.choice(REMARKS),
        "The {other} weighed {other_weight}, the {name} {weight}.",
        rng.choice(
            (
                "I bought the {name} and left the {other} to {friend}.",
                "In the end {friend} took the {other} and I the {name}.",
                "Since then I have dreamt of the {other}, but I use the {name}.",
            )
        ),
    )
    return " ".join(voice.say(line) for line in lines)


KINDS: dict[Callable[[Random], str], int] = {  # kind -> weight
    catalogue_page: 16,
    review: 8,
    press_note: 7,
    shop_window: 5,
    letter: 7,
    jury_statement: 8,
    markdown_page: 7,
    spec_sheet: 6,
    interview: 4,
    manual: 4,
    comparison: 7,
    index_page: 9,
    numbered_index: 8,
    raffle: 3,
    stock_list: 4,
    delivery_note: 3,
    table_of_facts: 4,
    exhibition_tour: 5,
    newsletter: 5,
    shop_story: 6,
    word_game: 2,
    two_finds: 3,
}


def write_document(rng: Random) -> str:
    """One document of 40 to 250 words."""
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    return until(lambda: kind(rng), DOCUMENT_WORDS)
