"""Text that was UTF-8 once and was then read as Latin-1: `cafÃ©` for `café`."""

import re
from collections.abc import Iterable

SIGNS = re.compile("[ÂÃ][\x80-\xbf]|â€[\x80-\x9d“”™œ˜¦]")
SHOWN_CHARS = 30


def misread_sample(texts: Iterable[str]) -> str | None:
    """The first piece of text that looks misread, with a little of what stands around it; None if all looks well."""
    for text in texts:
        if not text.isascii() and (found := SIGNS.search(text)):
            start = max(0, found.start() - SHOWN_CHARS // 2)
            return text[start : start + SHOWN_CHARS].replace("\n", " ")
    return None
