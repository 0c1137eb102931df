"""Templates as plain expressions: the very text that Jinja renders, or none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.io.plain_template import builder, expression_of
from ftkit.io.template import sandbox
from ftkit.io.template_files import load_template, shipped_names

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def rendered(expression, fields):
    """What an expression of `fields` gives."""
    sources = {name: f"(record[{name!r}] + '')" for name in fields}
    return builder(sources, "True", {"text": expression})(fields)["text"]


PLAIN = [name for name in shipped_names() if load_template(name).kind != "chat"]


@pytest.mark.parametrize("name", PLAIN)
def test_every_shipped_template_is_plain_and_equal_to_jinja(name):
    template = load_template(name)
    names = [*template.required, *template.optional]
    parts = [part for part in ("prompt", "completion", "chosen", "rejected", "label") if getattr(template, part)]

    @given(st.fixed_dictionaries({field: TEXT for field in names}))
    def check(fields):
        for part in parts:
            quick = rendered(template.quick(part), fields)
            assert quick == template.render_part(part, fields, "f:1")

    check()


PIECES = ["a", "'", '"', "\\", "\n", "{ ", " }", "é", "{{ x }}", "{{- y -}}", "{% if x %}", "{% else %}", "{% endif %}"]


@given(st.lists(st.sampled_from(PIECES), max_size=8), TEXT, TEXT)
def test_any_template_gives_jinjas_text_or_is_left_to_jinja(pieces, x, y):
    source, environment = "".join(pieces), sandbox()
    try:
        compiled = environment.from_string(source)
    except Exception:
        return  # no template
    expression = expression_of(environment, source)
    assert expression is not None, source
    assert rendered(expression, {"x": x, "y": y}) == compiled.render(x=x, y=y)


@pytest.mark.parametrize(
    "source", ["{{ x|trim }}", "{{ x.y }}", "{% for a in x %}{% endfor %}", "{{ 1 }}", "{% if not x %}{% endif %}"]
)
def test_a_template_that_does_more_is_left_to_jinja(source):
    assert expression_of(sandbox(), source) is None


def test_what_is_missing_or_no_text_raises():
    build = builder({"x": "(record['x'] + '')"}, "True", {"text": "('a' + fields['x'])"})
    assert build({"x": "b"}) == {"text": "ab"}
    with pytest.raises(KeyError):
        build({})
    with pytest.raises(TypeError):
        build({"x": 5})
