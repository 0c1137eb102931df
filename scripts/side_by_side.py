"""Print rows of `ftkit eval --baseline` for reading: what was asked, the reference, the base's and the tuned answer.

head -n 2 predictions.jsonl | python scripts/side_by_side.py
"""

import sys
import textwrap

import orjson


def main() -> None:
    """From stdin to stdout."""
    for line in sys.stdin.buffer:
        row = orjson.loads(line)
        asked = row["prompt"].partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]
        parts = {"asked": asked or row["prompt"], "reference": row["reference"]}
        parts |= {"base": row.get("base_prediction", ""), "tuned": row["prediction"]}
        for name, text in parts.items():
            body = textwrap.wrap(" ".join(text.split()), width=100) or [""]
            sys.stdout.write(f"{name + ':':<11}" + ("\n" + " " * 11).join(body) + "\n")
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
