"""What a model with a head for classes answers: the label of each text, and how sure it is."""

import sys
from collections.abc import Iterable

import orjson

from ftkit import console
from ftkit.core.chat_settings import ChatSettings
from ftkit.core.class_evaluation import as_example, log_probabilities
from ftkit.core.encoding import Encoder
from ftkit.errors import ExitCode, UserError
from ftkit.io.questions import Question, read_questions
from ftkit.io.trained import Loaded


def refuse_for_classes(settings: ChatSettings) -> None:
    """Options of a dialogue say nothing to a head for classes."""
    if len(settings.runs) > 1:
        what = "a head for classes is asked alone, not beside others"
        raise UserError(what, ExitCode.USAGE, hint=f"ftkit chat {settings.runs[0]}")
    for flag, value in (("--system", settings.system), ("--template", settings.template)):
        if value is not None:
            raise UserError(f"{flag}: a head for classes reads one text", ExitCode.USAGE, hint="leave it out")


def tell_classes(asked: Iterable[Question] | None, settings: ChatSettings, loaded: Loaded) -> None:
    """One line for each text, in order, as it comes; at a terminal too."""
    console.info(f"tells one of {len(loaded.classes)} labels: {', '.join(loaded.classes)}")
    encoder = Encoder(loaded.tokenizer, classes=loaded.classes)
    for question in asked or read_questions(sys.stdin.buffer, "<stdin>"):
        ids = encoder.class_ids(question.text, loaded.context)
        (logs,) = log_probabilities(loaded.model, [as_example(ids)])
        shares = dict(zip(loaded.classes, logs.exp().tolist(), strict=True))
        label = loaded.classes[int(logs.argmax())]
        if settings.json:
            line = orjson.dumps({"text": question.text, "label": label, "share": shares[label], "shares": shares})
        else:
            line = console.safe(label, sys.stdout).encode("utf-8", "replace")
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
