"""The quick way to make a row gives the row of the exact way, or none."""

from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.row_plan import Beginning, make_plan
from ftkit.errors import UserError
from ftkit.io.template_files import load_template

VALUES = st.one_of(
    st.sampled_from(
        ["", " ", "nan", "null", "an answer that is long", "{x}", 'it\'s "quoted"\\\n', None, 5, 1.5, True]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=15),
)
RECORDS = st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES)
SAMPLE = {"a": "a text", "b": "another text", "c": "a third"}
PLANS = [
    ("alpaca", ["instruction=Say {a} and {b}.", "output=c"]),
    ("alpaca", ["instruction=a", "input=b", "output={c}!"]),
    ("alpaca-end", ["instruction=a", "output=c"]),
    ("completion", ["prompt={a}{b}{c}", "completion=c"]),
    ("text", ["text=On {a}: {c}"]),
]


@given(RECORDS, st.sampled_from(PLANS))
def test_the_quick_way_gives_the_row_of_the_exact_way_or_none(record, plan_of):
    name, maps = plan_of
    plan = make_plan(Beginning("f", 1, list(SAMPLE), [SAMPLE]), load_template(name), maps)
    quick = plan.quick(record)
    try:
        exact = plan.make(record, "f:1")
    except UserError:
        exact = None
    quick = quick and {**quick, **plan.carried}
    assert quick is None or quick == exact
    assert quick is None or list(quick) == list(exact)


def test_a_good_row_goes_the_quick_way():
    for name, maps in PLANS:
        plan = make_plan(Beginning("f", 1, list(SAMPLE), [SAMPLE]), load_template(name), maps)
        assert plan.quick({**SAMPLE, "c": "an answer that is long"}) is not None
