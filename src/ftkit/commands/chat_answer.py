"""An answer on the terminal: piece by piece as it comes, Markdown drawn at its end, its length and speed below it."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ftkit import console
from ftkit.core.conversation import Conversation, Reply


def show_answer(conversation: Conversation, text: str) -> bool:
    """Answer aloud; Ctrl-C ends the answer, and what was said by then is kept. False if nothing was said.

    The turn is kept before the status says that it ended: whoever reads that may press Ctrl-C again at once.
    """
    reply = conversation.ask(text)
    say_dropped(conversation, reply)
    began = time.perf_counter()
    shown = console.Screen()
    with ctrl_c_calls(reply.stop) as pressed:
        try:
            for piece in reply:
                shown.write(piece)
        except KeyboardInterrupt:
            pressed.append(signal.SIGINT)
        finally:
            shown.end()
        ended = time.perf_counter()
        stopped = bool(pressed)
        is_kept = bool(reply.content) or not stopped
        if is_kept:
            conversation.keep(text, reply)
    with suppress(KeyboardInterrupt):  # one more press stops nothing
        if not stopped and not conversation.speaker.only_continues:
            shown.draw_markdown()
        say_status(conversation, reply, began, ended, stopped=stopped)
    return is_kept


@contextmanager
def ctrl_c_calls(stop: Callable[[], None]) -> Iterator[list[int]]:
    """While open, the first Ctrl-C calls `stop`, a second one interrupts; the list holds those that were pressed.

    An exception in the middle of a forward pass can get lost: libraries call back into Python where none may pass.
    """
    pressed: list[int] = []

    def handle(number: int, _: object) -> None:
        pressed.append(number)
        stop()
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def say_dropped(conversation: Conversation, reply: Reply) -> None:
    """The turns that the model no longer sees."""
    if dropped := reply.prompt.dropped:
        turns = "turn is" if dropped == 1 else f"{dropped} turns are"
        full = f"the context of {conversation.speaker.context:,} tokens is full (/reset begins again)"
        console.info(f"the oldest {turns} left out: {full}")


def say_status(conversation: Conversation, reply: Reply, began: float, ended: float, *, stopped: bool) -> None:
    """Length and speed of an answer, how full the context is, and why it ended where the model did not end it."""
    tokens, context = len(reply.answer.ids), conversation.speaker.context
    parts = [f"{tokens} token{'' if tokens == 1 else 's'}", *speed(tokens, began, reply.first_at, ended)]
    if context:
        parts.append(f"context {len(reply.prompt.ids) + tokens:,} of {context:,}")
    if stopped:
        parts.append("stopped by you")
    elif reply.answer.finish == "length":
        limit = conversation.sampling.max_new
        full = "ended by length: the context is full"
        parts.append(f"ended by length (/set max-new {2 * limit})" if tokens >= limit else full)
    console.faint(f"[{', '.join(parts)}]")


def speed(tokens: int, began: float, first_at: float | None, ended: float) -> list[str]:
    """Tokens a second from the first token on, and how long that one took; of a single token only the latter."""
    if first_at is None:
        return []
    waited = first_at - began
    first = f"first after {waited:.1f} s" if waited >= 1 else f"first after {1000 * waited:.0f} ms"
    if tokens < 2:
        return [first]
    return [f"{(tokens - 1) / max(ended - first_at, 1e-9):.0f} tokens/s", first]
