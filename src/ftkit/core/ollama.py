"""The Modelfile of Ollama: which model, how prompts are written around what a person types, what ends an answer.

Format: https://docs.ollama.com/modelfile. TEMPLATE is a Go template; Ollama puts BOS in front by itself.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from ftkit.errors import UserError
from ftkit.io.template import Template

PROMPT, SYSTEM = "\ue000prompt\ue000", "\ue000system\ue000"
"""Marks in place of what Ollama fills in."""
Messages = list[dict[str, Any]]
PARAMETERS = {"max_new": "num_predict", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
"""Settings of answers as a Modelfile calls them."""


def modelfile(
    tokenizer: Any,
    template: Template | None,
    stop: Sequence[str],
    *,
    system: str | None = None,
    generation: Mapping[str, int | float] = MappingProxyType({}),
) -> str:
    """The Modelfile of a folder with a merged model. stop: strings that end an answer, besides the end of text.

    system, generation: the message that conversations begin with, and how answers are made, as training recorded them.
    """
    ends = dict.fromkeys([*stop, *(template.stop if template else ()), str(tokenizer.eos_token)])
    lines = ["FROM .", f'TEMPLATE """{go_template(tokenizer, template)}"""']
    if system and '"""' not in system:  # the format has no way to write these
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {PARAMETERS[name]} {value}" for name, value in generation.items()]
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends if end)]) + "\n"


def go_template(tokenizer: Any, template: Template | None) -> str:
    """The prompt as a Go template, with a part for a system message where the model has one."""
    render = renderer(tokenizer, template)
    user = {"role": "user", "content": PROMPT}
    plain = as_go(render([user]), tokenizer)
    try:
        framed = as_go(render([{"role": "system", "content": SYSTEM}, user]), tokenizer)
    except (TemplateError, UserError, ValueError):  # many chat templates refuse a system message
        return plain
    return plain if "{{ .System }}" not in framed else f"{{{{ if .System }}}}{framed}{{{{ else }}}}{plain}{{{{ end }}}}"


def renderer(tokenizer: Any, template: Template | None) -> Callable[[Messages], str]:
    """Messages -> the prompt that training used: by its template, by the tokenizer's chat template, or as typed."""
    if template is not None and template.kind == "chat":
        return lambda messages: template.render_chat(messages, generate=True)
    if template is not None:
        return lambda messages: template.prompt_for(messages[-1]["content"])
    if getattr(tokenizer, "chat_template", None):
        return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return lambda messages: messages[-1]["content"]


def as_go(text: str, tokenizer: Any) -> str:
    """Rendered text as a Go template: marks become fields, braces of the text are quoted, BOS goes."""
    start = tokenizer.bos_token
    text = text.removeprefix(start) if start else text
    text = text.replace("{{", '{{ "{{" }}')
    return text.replace(PROMPT, "{{ .Prompt }}").replace(SYSTEM, "{{ .System }}")
