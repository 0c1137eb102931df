"""Pieces of a page for the browser: one file of HTML, CSS and SVG, without scripts and without network.

Every function gives HTML. Texts are escaped here and nowhere else: what is handed over is text, and only `Html` is not
escaped again. Colours follow the browser's light or dark mode; wide things scroll in their own box.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape

Point = tuple[float, float]
COLOURS = ("--one", "--two", "--three", "--four", "--five")
WORDS = re.compile(r"\s+|\w+|[^\w\s]")
LITTLE_IN_COMMON = 0.3
"""Below this similarity a text is shown without marks: marking nearly all of it helps nobody."""
STYLE = """
:root{color-scheme:light dark;--page:#fff;--box:#f5f6f8;--text:#1d2330;--faint:#5c6675;--line:#d5dae2;
--good:#0b6b3a;--bad:#b3261e;--one:#1f5fbf;--two:#b3541e;--three:#1b7f5c;--four:#8a3ffc;--five:#8a6d00;
--new:#dbe8ff;--heat:31,95,191}
@media(prefers-color-scheme:dark){:root{--page:#14171c;--box:#1d2229;--text:#e6e9ee;--faint:#9aa5b4;--line:#37404c;
--good:#5fd38d;--bad:#ff8a80;--one:#7fb0ff;--two:#ffab73;--three:#5fd3a8;--four:#c59bff;--five:#e0c15a;
--new:#21406f;--heat:127,176,255}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem clamp(.8rem,3vw,2.5rem) 3rem;max-width:76rem;background:var(--page);color:var(--text);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1rem 0 .3rem}p{margin:.4rem 0;max-width:48rem}
.faint,figcaption{color:var(--faint);font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:middle}
th{color:var(--faint);font-weight:600;font-size:.9rem;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
table.plain td{text-align:left;white-space:normal;vertical-align:top}
table.plain td:first-child{color:var(--faint);white-space:nowrap}
td svg{display:block}
ul.findings{list-style:none;padding:0;margin:.6rem 0}
ul.findings li{padding:.45rem .8rem;margin:.35rem 0;background:var(--box);
border-left:.3rem solid var(--faint);border-radius:.2rem}
ul.findings li.better{border-color:var(--good)}ul.findings li.worse{border-color:var(--bad)}
.better{color:var(--good)}.worse{color:var(--bad)}li.better,li.worse{color:inherit}
figure{margin:.6rem 0}figure svg{width:100%;height:auto;max-width:46rem;display:block}
svg text{fill:var(--faint);font:11px system-ui,sans-serif}
figure.wide{overflow-x:auto}figure.wide svg{min-width:34rem}
@media(max-width:40rem){figure:not(.wide) svg text{font-size:19px}}
article{border:1px solid var(--line);border-radius:.4rem;padding:.6rem .9rem;margin:.8rem 0}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:.9rem}
.columns>div>h3{margin:.4rem 0 .2rem;color:var(--faint);font-size:.85rem}
.said{white-space:pre-wrap;background:var(--box);padding:.5rem .7rem;border-radius:.3rem;max-height:24rem;overflow-y:auto}
ins{background:var(--new);text-decoration:underline;text-underline-offset:.15em}del{color:var(--bad);text-decoration:line-through}
pre{background:var(--box);padding:.7rem .9rem;border-radius:.3rem;white-space:pre-wrap}
td.heat{min-width:2.6rem}
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def join(pieces: Iterable[str]) -> Html:
    """Pieces one after another."""
    return Html("".join(text(piece) for piece in pieces))


def text(value: object) -> str:
    """A value as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else escape(str(value))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """An element; `class_` gives its class."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(text, content))}</{name}>")


def page(title: str, subtitle: str, *sections: str) -> str:
    """A whole page. Its policy forbids scripts and every request, whatever the data holds."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
    )
    body = tag("body", tag("h1", title), tag("p", subtitle, class_="faint"), *map(Html, sections))
    return f"{head}{body}</html>\n"


def section(title: str, *content: object) -> Html:
    """A part of the page under its title."""
    return tag("section", tag("h2", title), *content)


def note(words: str) -> Html:
    """A remark in small print."""
    return tag("p", words, class_="faint")


def findings(sentences: Iterable[tuple[str, str]]) -> Html:
    """(better, worse or unclear; sentence) one below the other, marked by colour."""
    return tag(
        "ul",
        *(tag("li", sentence[:1].upper() + sentence[1:], class_=kind) for kind, sentence in sentences),
        class_="findings",
    )


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], *, plain: bool = False) -> Html:
    """A table that scrolls in its own box; the first column is text, the others numbers. `plain`: two columns of text."""
    head = tag("thead", tag("tr", *(tag("th", name) for name in columns))) if columns else Html("")
    body = tag("tbody", *(tag("tr", *(cell if is_cell(cell) else tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", head, body, class_="plain" if plain else "numbers"), class_="scroll")


def is_cell(content: object) -> bool:
    """True for HTML that is a table cell of its own."""
    return isinstance(content, Html) and content.startswith("<td")


def heat_table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]) -> Html:
    """Counts whose cells are the darker the larger their share of the row."""

    def cell(count: int, whole: int) -> Html:
        share = count / whole if whole else 0.0
        return tag("td", count or "", class_="heat", style=f"background:rgba(var(--heat),{0.75 * share:.2f})")

    lines = [[name, *(cell(count, sum(counts)) for count in counts)] for name, counts in rows]
    return table([corner, *columns], lines)


def interval_bar(low: float, value: float, high: float, *, kind: str) -> Html:
    """A difference and its interval around a line at zero; each on a scale of its own, better to the right."""
    reach = max(abs(low), abs(high)) or 1.0
    x = [round(60 + 54 * number / reach, 1) for number in (low, value, high)]
    colour = {"better": "--good", "worse": "--bad"}.get(kind, "--faint")
    words = {"better": "better", "worse": "worse"}.get(kind, "unclear")
    return Html(
        f'<svg viewBox="0 0 120 16" width="120" height="16" role="img" aria-label="{words}">'
        f'<line x1="60" x2="60" y1="1" y2="15" stroke="var(--line)"/>'
        f'<line x1="{x[0]}" x2="{x[2]}" y1="8" y2="8" stroke="var({colour})" stroke-width="3"/>'
        f'<circle cx="{x[1]}" cy="8" r="4" fill="var({colour})"/></svg>'
    )


def bars(names: Sequence[str], values: Sequence[float], intervals: Sequence[Point], label: str) -> Html:
    """One dot with its interval for each name, on a common scale."""
    ends = [bound for pair in intervals for bound in pair] + list(values)
    low, high, ticks = scale(min(ends), max(ends))
    width, step = 700.0, 24
    left = min(12 + 7.0 * max(map(len, names), default=0), 280.0)
    height = step * len(names) + 34

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * (width - left - 14), 1)

    marks = [f'<line x1="{x(t)}" x2="{x(t)}" y1="4" y2="{height - 30}" stroke="var(--line)"/>' for t in ticks]
    marks += [tick_text(x(tick), height - 16, tick, ticks) for tick in ticks]
    for number, (name, value, (bottom, top)) in enumerate(zip(names, values, intervals, strict=True)):
        y = step * number + 16
        marks.append(
            f'<text x="{left - 8:.1f}" y="{y + 4}" text-anchor="end">{escape(ellipsis(name, 40))}</text>'
            f'<line x1="{x(bottom)}" x2="{x(top)}" y1="{y}" y2="{y}" stroke="var(--one)" stroke-width="3"/>'
            f'<circle cx="{x(value)}" cy="{y}" r="4.5" fill="var(--one)"/>'
        )
    return figure(marks, width, height, label, class_="wide")


def histogram(series: Mapping[str, Sequence[float]], label: str) -> Html:
    """How often values occur: one row of bars for each series, below each other on a common scale."""
    values = [value for one in series.values() for value in one]
    low, high, ticks = scale(min(values, default=0.0), max(values, default=1.0))
    bins, width, row = 40, 700.0, 84
    left = 10.0
    height = row * len(series) + 34

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * (width - 2 * left), 1)

    marks = [tick_text(x(tick), height - 12, tick, ticks) for tick in ticks]
    for number, (name, one) in enumerate(series.items()):
        counts = [0] * bins
        for value in one:
            counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
        floor, top = row * (number + 1) - 4, max(counts) or 1
        marks.append(f'<line x1="{left}" x2="{width - left}" y1="{floor}" y2="{floor}" stroke="var(--line)"/>')
        for place, count in enumerate(counts):
            if count:
                tall = (row - 26) * count / top
                start, end = x(low + (high - low) * place / bins), x(low + (high - low) * (place + 1) / bins)
                marks.append(
                    f'<rect x="{start}" width="{max(1.0, end - start - 1):.1f}" y="{floor - tall:.1f}" '
                    f'height="{tall:.1f}" fill="var({COLOURS[number % len(COLOURS)]})"/>'
                )
        middle = sorted(one)[len(one) // 2] if one else 0
        told = f"{name}: {len(one)}, median {short(middle)}, largest {short(max(one, default=0))}"
        marks.append(f'<text x="{left}" y="{row * number + 16}">{escape(told)}</text>')
    return figure(marks, width, height, label)


def line_chart(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Html:
    """Curves over a common x; several are told apart by colour and named above the chart."""
    points = [point for one in series.values() for point in one]
    if not points:
        return note("no points yet")
    x_low, x_high, x_ticks = scale(min(p[0] for p in points), max(p[0] for p in points))
    y_low, y_high, y_ticks = scale(min(p[1] for p in points), max(p[1] for p in points))
    width, height, left, top, floor = 700.0, 244, 84.0, 12.0, 212.0

    def place(point: Point) -> str:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - 14)
        return f"{x:.1f},{floor - (point[1] - y_low) / (y_high - y_low) * (floor - top):.1f}"

    marks = []
    for tick in y_ticks:
        y = place((x_low, tick)).partition(",")[2]
        marks.append(f'<line x1="{left}" x2="{width - 14}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        marks.append(f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x = place((tick, y_low)).partition(",")[0]
        marks.append(tick_text(float(x), floor + 20, tick, x_ticks))
    for number, one in enumerate(series.values()):
        colour = COLOURS[number % len(COLOURS)]
        curve = " ".join(place(point) for point in one)
        marks.append(
            f'<polyline points="{curve}" fill="none" stroke="var({colour})" stroke-width="1.8" '
            'vector-effect="non-scaling-stroke"/>'
        )
    caption = f"{y_label} over {x_label}"
    return figure(marks, width, height, caption, legend(list(series)) if len(series) > 1 else Html(""))


def tick_text(x: float, y: float, tick: float, ticks: Sequence[float]) -> str:
    """The number below an axis; the first and the last one stay within the drawing."""
    anchor = "start" if tick == ticks[0] else "end" if tick == ticks[-1] else "middle"
    return f'<text x="{x}" y="{y:g}" text-anchor="{anchor}">{short(tick)}</text>'


def legend(names: Sequence[str]) -> Html:
    """Names behind a bar in their colour."""
    colours = (COLOURS[number % len(COLOURS)] for number in range(len(names)))
    return join(
        tag("span", Html("&nbsp; "), tag("b", "▬ ", style=f"color:var({colour})"), name)
        for colour, name in zip(colours, names, strict=True)
    )


def figure(
    marks: Iterable[str], width: float, height: float, caption: str, more: Html = Html(""), **attributes: str
) -> Html:
    """A drawing that is as wide as its place, below its caption."""
    drawing = Html(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(caption)}">{"".join(marks)}</svg>'
    )
    return tag("figure", tag("figcaption", caption, more), drawing, **attributes)


def scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """(start, end, ticks) of an axis that holds low and high: round numbers, four to eight of them."""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number as an axis shows it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ellipsis(words: str, longest: int) -> str:
    """The text, cut where it is longer."""
    return words if len(words) <= longest else words[: longest - 1] + "…"


def said(content: str) -> Html:
    """A text of the data or of a model, with its line breaks."""
    return tag("div", content if content else Html('<span class="faint">(nothing)</span>'), class_="said")


def columns(parts: Mapping[str, Html]) -> Html:
    """Named parts beside each other, or below each other where there is no room."""
    return tag("div", *(tag("div", tag("h3", name), part) for name, part in parts.items()), class_="columns")


def difference(answer: str, reference: str) -> Html:
    """An answer with its differences from the reference: <ins> is only in the answer, <del> only in the reference.

    Texts with little in common are not marked.
    """
    ours, theirs = WORDS.findall(answer), WORDS.findall(reference)
    words, others = ([word for word in side if not word.isspace()] for side in (ours, theirs))
    if SequenceMatcher(None, others, words, autojunk=False).ratio() < LITTLE_IN_COMMON:
        return Html(escape(answer))
    matcher = SequenceMatcher(None, theirs, ours, autojunk=False)
    pieces: list[str] = []
    for what, start, end, first, last in matcher.get_opcodes():
        if what == "equal":
            pieces.append("".join(ours[first:last]))
            continue
        if end > start:
            pieces.append(tag("del", "".join(theirs[start:end])))
        if last > first:
            pieces.append(tag("ins", "".join(ours[first:last])))
    return join(pieces)
