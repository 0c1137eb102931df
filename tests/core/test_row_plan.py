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
READY = {"prompt": "a question", "completion": "an answer that is long"}
DOLLY = {"instruction": "a question", "response": "an answer that is long"}
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


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "completion", "instruction", "response", "context", "weight", "label", "meta"]),
        st.one_of(VALUES, st.just(False), st.integers(-1, 3)),
    ),
    st.sampled_from(
        [(READY, None), (READY, "completion"), (READY, "alpaca"), (DOLLY, "alpaca"), (DOLLY, "completion")]
    ),
)
def test_the_quick_way_loses_no_weight_no_label_and_no_context(given_values, plan_of):
    first, name = plan_of
    record = {**first, **given_values}
    plan = make_plan(Beginning("f", 1, list(first), [first], False), name and load_template(name), [])
    assert plan.quick(first) is not None
    quick = plan.quick(record)
    try:
        exact = plan.make(record, "f:1")
    except UserError:
        exact = None
    assert quick is None or {**quick, **plan.carried} == exact
    if exact is not None and first is READY:
        assert exact.get("weight") == record.get("weight") and record.get("label") in (None, "", " ")
    if exact is not None and first is DOLLY and (record.get("context") or "").strip():
        assert record["context"] in exact["prompt"]


def test_a_good_row_goes_the_quick_way():
    for name, maps in PLANS:
        plan = make_plan(Beginning("f", 1, list(SAMPLE), [SAMPLE]), load_template(name), maps)
        assert plan.quick({**SAMPLE, "c": "an answer that is long"}) is not None
