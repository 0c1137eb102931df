"""Templates: what they render, what they refuse, and the fingerprint that names them."""

import hashlib

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io.template import parse_template
from ftkit.io.template_files import load_template, shipped_folder, shipped_names, template_of_rows

SMALL = 'name = "mine"\nrequired = ["q", "a"]\ntyped = "q"\nprompt = "Q: {{ q }}\\nA:"\ncompletion = " {{ a }}"\n'


def error_of(text):
    with pytest.raises(UserError) as caught:
        parse_template(text, "mine.toml")
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value.message


def test_fields_are_rendered_as_written():
    template = parse_template(SMALL, "mine.toml")
    assert template.render_prompt({"q": "1 < 2 & {{ a }}?"}) == "Q: 1 < 2 & {{ a }}?\nA:"
    assert template.render_completion({"q": "", "a": "yes\n"}) == " yes\n"


def test_alpaca_is_what_stanford_wrote_with_and_without_an_input():
    alpaca = load_template("alpaca")
    without = alpaca.render_prompt({"instruction": "Add.", "input": ""})
    assert without == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    with_input = alpaca.render_prompt({"instruction": "Add.", "input": "1 2"})
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )


def test_a_fingerprint_is_the_name_and_the_hash_of_the_file():
    data = (shipped_folder() / "alpaca.toml").read_bytes()
    assert load_template("alpaca").fingerprint == f"alpaca@{hashlib.sha256(data).hexdigest()[:12]}"
    assert parse_template(SMALL + "# a remark\n", "x").fingerprint != parse_template(SMALL, "x").fingerprint


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_template_renders_what_it_requires(name):
    template = load_template(name)
    assert template.name == name
    if template.kind == "chat":
        assert "hello" in template.render_chat([{"role": "user", "content": "hello"}], generate=True)
    else:
        fields = {field: f"<{field}>" for field in template.required}
        parts = [part for part in ("prompt", "completion", "chosen", "rejected", "label") if getattr(template, part)]
        rendered = "".join(template.render_part(part, fields, "f:1") for part in parts)
        assert all(text in rendered for text in fields.values())


@pytest.mark.parametrize("text", ["Add 1 and 2.", "", "### Response:", "a\nb"])
def test_what_was_typed_is_found_again_in_the_prompt(text):
    template = load_template("alpaca")
    assert template.typed_text(template.prompt_for(text)) == text
    with_input = template.render_prompt({"instruction": text, "input": "more"})
    assert template.typed_text(with_input) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "x"\nx = = 1\n', "line 2"),
        ('name = "x"\n', "has no completion"),
        ('name = "x"\nkind = "chat"\n', "has no chat"),
        ('name = "a b"\ncompletion = "x"\n', "may hold letters"),
        (SMALL + 'promt = "x"\n', "unknown key 'promt'"),
        ('name = "x"\ncompletion = "line one\\n{% if %}"\n', "mine.toml:2: completion: Expected an expression"),
        ('name = "x"\ncompletion = """\n\na\n{% if %}b"""\nstop = []\n', "mine.toml:5: completion: "),
        ('name = "x"\ncompletion = """a\r\n{% if %}b"""\r\n', "mine.toml:3: completion: "),
        ("name = 'x'\nprompt = '''\ncompletion = a'''\ncompletion = '{{ a'\n", "mine.toml:4: completion: "),
        ('name = "x"\ncompletion = """a\\nb\n{% if %}"""\n', "mine.toml: completion, line 3: "),
        ('name = "x"\n"completion" = "{% if %}"\n', "mine.toml: completion, line 1: "),
        ('name = "x"\ncompletion = "{{ ' + "(" * 9_000 + ' }}"\n', "mine.toml:2: completion: nested too deep"),
        ('name = "x"\ncompletion = "' + "{% for a in b %}" * 25 + "{% endfor %}" * 25 + '"\n', "nested too deep"),
        ("x = " + "[" * 9_000, "mine.toml: nested too deep"),
        ('required = "text"\n', "mine.toml: 'required' should be a list of texts"),
        (SMALL + "optional = 5\n", "mine.toml: 'optional' should be a list of texts"),
        (SMALL + 'stop = "### End"\n', "mine.toml: 'stop' should be a list of texts"),
        (SMALL + 'stop = ["### End", 1]\n', "mine.toml: 'stop' should be a list of texts"),
        ("prompt = 5\n", "mine.toml: 'prompt' should be a text"),
        ('name = "x"\ncompletion = ["x"]\n', "mine.toml: 'completion' should be a text"),
        (SMALL + "kind = []\n", "mine.toml: 'kind' should be a text"),
        ("typed = ['a']\n", "mine.toml: 'typed' should be a text"),
        (SMALL + "#" * 70_000, "larger than 64,000 bytes"),
    ],
)
def test_a_template_file_with_a_mistake_is_named_with_its_place(text, words):
    assert words in error_of(text)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ fields.x }}", "'fields' is undefined"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('only short ones') }}", "only short ones"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ missing }}", "'missing' is undefined"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "calls itself without end"),
        ("{{ 'x'.ljust(10 ** 10) }}", "sandbox: the result of ljust is too large"),
        ("{{ 'x' | center(10 ** 10) }}", "sandbox: the result of center is too large"),
        ("{{ ['x'] | map('center', width=10 ** 10) | list }}", "sandbox: the result of center is too large"),
        ("{{ [1] | batch(10 ** 10, 0) | list }}", "sandbox: the result of batch is too large"),
        ("{{ '%9999999999d' % 1 }}", "sandbox: the result of % is too large"),
        ("{{ '%*d' % (10 ** 10, 1) }}", "sandbox: the result of % is too large"),
        ("{{ '%9999999999d' | format(1) }}", "sandbox: the result of format is too large"),
        ("{{ '{:>9999999999}'.format(1) }}", "sandbox: the result of format is too large"),
        ("{{ '{:>{}}'.format(1, 10 ** 10) }}", "sandbox: the result of format is too large"),
        ("{{ ('x' * 10 ** 6) | replace('x', 'y' * 10 ** 6) }}", "sandbox: the result of replace is too large"),
        ("{{ (['x'] * 10 ** 4) | join('y' * 10 ** 6) }}", "sandbox: the result of join is too large"),
        ("{{ ('x' * 10 ** 6) | join('y' * 10 ** 6) }}", "sandbox: the result of join is too large"),
        ("{{ [1] | slice(10 ** 10) | list }}", "sandbox: the result of slice is too large"),
        ("{{ a | tojson(indent=10 ** 10) }}", "sandbox: the result of tojson is too large"),
        ("{{ 'a\\nb' | indent(10 ** 10) }}", "sandbox: the result of indent is too large"),
        ("{{ ('x' * 3 * 10 ** 7) ~ ('x' * 3 * 10 ** 7) }}", "sandbox: renders to more than 50,000,000 characters"),
        ("{{ ('x' * 3 * 10 ** 7) + ('x' * 3 * 10 ** 7) }}", "sandbox: the result of \\+ is too large"),
        ("{% set x = 'x' * 3 * 10 ** 7 %}{{ x }}{{ x }}", "sandbox: renders to more than 50,000,000 characters"),
    ],
)
def test_a_template_cannot_leave_its_sandbox_and_its_errors_are_words(body, words):
    template = parse_template(f'name = "x"\nrequired = ["a"]\ncompletion = "{body}"\n', "x.toml")
    with pytest.raises(UserError, match=words) as caught:
        template.render_completion({"a": "b"})
    assert caught.value.exit_code == ExitCode.DATA


def test_what_fills_texts_in_an_ordinary_way_is_no_concern_of_the_sandbox():
    body = (
        "{{ '%s is %05.1f' % (a, 99999999999) }}|{{ '{:,} {}'.format(60000000, a) }}|{{ a.ljust(12) ~ 1 ~ 'x' }}|"
        "{{ (a * 9000) | replace('b', 'c' * 9000) | length }}|{{ [a, 600000000] | join(', ') }}|{{ a | indent(2) }}|"
        "{{ 99999999 | tojson }}|{{ 99999999 | center(10) }}|{{ [1, 2] | slice(2) | list }}|{{ 'ab' | join(99999999) }}"
    )
    template = parse_template(f'name = "x"\nrequired = ["a"]\ncompletion = """{body}"""\n', "x.toml")
    expected = (
        "a 123456789 is 99999999999.0|60,000,000 a 123456789|a 123456789 1x|99000|a 123456789, 600000000|a 123456789"
        "|99999999| 99999999 |[[1], [2]]|a99999999b"
    )
    assert template.render_completion({"a": "a 123456789"}) == expected


def test_a_name_that_is_no_field_is_to_be_made_one():
    template = parse_template('name = "x"\nrequired = ["text"]\ncompletion = "{{ product }}"\n', "x.toml")
    with pytest.raises(UserError, match="'product' is undefined") as caught:
        template.render_completion({"text": "b"})
    assert 'required = ["text", "product"]' in caught.value.hint and "--map" not in caught.value.hint
    wrong = parse_template('name = "x"\nrequired = ["text"]\ncompletion = "{{ text.x }}"\n', "x.toml")
    with pytest.raises(UserError, match="has no attribute 'x'") as caught:
        wrong.render_completion({"text": "b"})
    assert "it needs text" in caught.value.hint


def test_an_unknown_name_is_a_usage_error_that_lists_the_shipped_ones():
    with pytest.raises(UserError) as caught:
        load_template("alpacca")
    assert caught.value.exit_code == ExitCode.USAGE
    assert "did you mean 'alpaca'" in (caught.value.hint or "") and "chatml" in (caught.value.hint or "")


def test_rows_find_their_template_by_its_hash():
    alpaca, mine = load_template("alpaca"), parse_template(SMALL, "mine.toml")
    assert template_of_rows(alpaca.fingerprint, None) == alpaca
    assert template_of_rows(mine.fingerprint, mine) == mine
    for fingerprint, given in [("alpaca@000000000000", None), (mine.fingerprint, None), (mine.fingerprint, alpaca)]:
        with pytest.raises(UserError) as caught:
            template_of_rows(fingerprint, given)
        assert caught.value.exit_code == ExitCode.DATA
