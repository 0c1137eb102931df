"""The Modelfile: the prompt that training used, as Ollama fills it in."""

from types import SimpleNamespace

from conftest import CHECKOUT

from ftkit.core.ollama import modelfile
from ftkit.io.template import parse_template

PLAIN = SimpleNamespace(eos_token="</s>", bos_token="<s>", chat_template=None)


def template(name):
    return parse_template((CHECKOUT / "templates" / f"{name}.toml").read_text(encoding="utf-8"), name)


def filled(text, prompt, system=""):
    """What Ollama would send: the few constructs of Go templates that we write."""
    body = text.split('TEMPLATE """')[1].split('"""')[0]
    if body.startswith("{{ if .System }}"):
        framed, plain = body.removeprefix("{{ if .System }}").removesuffix("{{ end }}").split("{{ else }}")
        body = framed if system else plain
    return body.replace("{{ .Prompt }}", prompt).replace("{{ .System }}", system).replace('{{ "{{" }}', "{{")


def test_the_prompt_is_the_one_that_the_template_renders():
    alpaca = template("alpaca")
    text = modelfile(PLAIN, alpaca, ["### End"])
    assert filled(text, "Name a fruit.") == alpaca.render_prompt({"instruction": "Name a fruit."})
    assert text.startswith("FROM .\n")
    assert text.endswith('PARAMETER stop "### End"\nPARAMETER stop "</s>"\n')


def test_a_chat_template_has_a_place_for_a_system_message():
    chatml = template("chatml")
    text = modelfile(PLAIN, chatml, [])
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    assert filled(text, "Hi") == chatml.render_chat([user], generate=True)
    assert filled(text, "Hi", "Be brief.") == chatml.render_chat([system, user], generate=True)
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_without_a_template_the_tokenizers_own_or_none_is_taken():
    assert filled(modelfile(PLAIN, None, []), "Hi") == "Hi"

    def apply(messages, **options):
        if messages[0]["role"] == "system":
            raise ValueError("no system messages here")
        return "<s>{{" + messages[0]["content"] + "}}"

    own = SimpleNamespace(eos_token="</s>", bos_token="<s>", chat_template="x", apply_chat_template=apply)
    assert filled(modelfile(own, None, []), "Hi") == "{{Hi}}", "Ollama puts BOS in front itself"


def test_the_system_message_and_the_settings_of_training_are_parameters():
    text = modelfile(PLAIN, template("chatml"), [], system="Be brief.", generation={"max_new": 9, "top_p": 0.5})
    assert '\nSYSTEM """Be brief."""\nPARAMETER num_predict 9\nPARAMETER top_p 0.5\nPARAMETER stop' in text
    assert "\nSYSTEM " not in modelfile(PLAIN, template("chatml"), [], system='a """quoted""" word')
