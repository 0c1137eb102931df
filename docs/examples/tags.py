"""Sentences with one word and its BIO tag on a line -> a prompt with the sentence, a completion with its entities."""

import json


def entities(record):
    """One prompt and completion; `record` is {"text": "word<TAB>tag<NEWLINE>..."}."""
    pairs = [line.split("\t") for line in record["text"].split("\n") if "\t" in line]
    found = []
    for word, tag in pairs:
        if tag.startswith("B-"):
            found.append({"type": tag[2:], "text": word})
        elif tag.startswith("I-") and found:
            found[-1]["text"] += " " + word
    sentence = " ".join(word for word, _ in pairs)
    return [{"prompt": f"Sentence: {sentence}\nEntities:", "completion": " " + json.dumps(found, ensure_ascii=False)}]
