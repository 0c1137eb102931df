"""Sentences with marked slots (snips) -> a prompt with the sentence, a completion with its slots as JSON."""

import json


def slots(record):
    """One prompt and completion; `record` is {"data": [{"text": ..., "entity": ...}, ...]}."""
    sentence = "".join(piece["text"] for piece in record["data"]).strip()
    found = {}
    for piece in record["data"]:
        if "entity" in piece:
            found.setdefault(piece["entity"], []).append(piece["text"].strip())
    prompt = f"Sentence: {sentence}\nSlots as JSON:"
    return [{"prompt": prompt, "completion": " " + json.dumps(found, ensure_ascii=False)}]


def dialogue(record):
    """The same as a conversation, so that it can be mixed with others."""
    (row,) = slots(record)
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"].strip()}]
    return [{"messages": turns}]
