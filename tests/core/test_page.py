import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core import page

VOID = {"meta", "link"}


class Reader(HTMLParser):
    """Checks that elements close in order, and collects their names, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.attributes, self.text = [], set(), [], ""

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


EVIL = "</style></svg><script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;"


def whole_page(words):
    return page.page(
        words,
        words,
        page.section(
            words,
            page.findings([("better", words)]),
            page.table([words, words], [[words, 1.5]]),
            page.heat_table(words, [words], [(words, [3])]),
            page.line_chart({words: [(0, 1), (1, 2)], "b": [(0, 1)]}, words, words),
            page.histogram({words: [1, 2, 3]}, words),
            page.bars([words], [0.5], [(0.4, 0.6)], words),
            page.columns({words: page.said(words)}),
            page.said(page.difference(words + " and more", words)),
            page.note(words),
        ),
    )


@given(st.one_of(st.just(EVIL), st.text(max_size=40)))
def test_no_text_becomes_markup(words):
    found, plain = read(whole_page(words)), read(whole_page("plain"))
    assert found.names <= plain.names | {"del", "ins"}
    assert not {"script", "img", "iframe", "form", "a", "object"} & found.names
    assert not any(name.startswith("on") for name, _ in found.attributes)


def test_the_text_itself_is_all_there():
    assert read(whole_page(EVIL)).text.count(EVIL) >= 10


def test_a_page_loads_nothing_and_its_policy_says_so():
    html = whole_page("plain")
    assert "default-src 'none'" in html and "<script" not in html
    assert not re.findall(r"""(?:src|href)="(?!data:)|url\(|@import""", html)


def test_differences_are_marked_word_by_word():
    assert page.difference("the blue cat sat", "the cat sat down") == ("the<ins> blue</ins> cat sat<del> down</del>")
    assert page.difference("same", "same") == "same"
    assert page.difference("nothing <b> alike", "quite other words") == "nothing &lt;b&gt; alike"


@given(st.text(alphabet="ab c\n,é", max_size=30), st.text(alphabet="ab c\n,é", max_size=30))
def test_what_is_not_crossed_out_is_the_answer(answer, reference):
    shown = page.difference(answer, reference)
    assert read(re.sub(r"<del>.*?</del>", "", shown, flags=re.DOTALL)).text == answer


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3, 3, None), (-7, 180, None)]
)
def test_axes_hold_all_values_between_round_numbers(low, high, ticks):
    start, end, found = page.scale(low, high)
    assert start <= low and high <= end and start < end and 3 <= len(found) <= 8
    if ticks:
        assert found == pytest.approx(ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_axes_hold_any_values(low, width):
    start, end, found = page.scale(low, low + width)
    slack = 1e-6 * (end - start)
    assert start <= low + slack and low + width <= end + slack and 2 <= len(found) <= 9


def test_every_value_is_in_one_bar_of_the_histogram_and_higher_bars_hold_more():
    html = page.histogram({"a": [1] * 30 + [2] * 10 + [5]}, "tokens")
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" fill', html)]
    assert heights == pytest.approx([58.0, 58.0 / 3, 58.0 / 30], abs=0.1)
    assert "a: 41, median 1, largest 5" in html


def test_points_of_a_curve_stand_where_their_numbers_say():
    html = page.line_chart({"loss": [(0, 2.0), (5, 1.0), (10, 0.0)]}, "step", "nats")
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="(.*?)"', html)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and y0 < y1 < y2  # falling: y grows downwards
    assert x1 == pytest.approx((x0 + x2) / 2) and y1 == pytest.approx((y0 + y2) / 2)
    assert page.line_chart({"loss": []}, "step", "nats") == page.note("no points yet")
