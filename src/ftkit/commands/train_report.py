"""report.html of a training run: one page, no network, made from what the run has written."""

from collections.abc import Sequence
from typing import Any

from ftkit.core.page import Html, columns, line_chart, note, page, said, section, table
from ftkit.io.run_folder import RunFolder

Line = dict[str, Any]
CURVES = {
    "Learning rate": ("lr", "learning rate"),
    "Gradient norm": ("grad_norm", "norm before clipping"),
    "Speed": ("tokens_per_second", "tokens/s"),
    "Memory": ("peak_memory_bytes", "largest use so far, GB"),
}
"""Title -> (key in metrics.jsonl, what the axis says)."""


def write_report(run: RunFolder, info: dict[str, Any]) -> None:
    """report.html of a run, from its metrics.jsonl and from what run.json says."""
    lines = run.read_log()
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "valid_loss" in line]
    parts = [
        section("Result", table([], result_rows(info), plain=True)),
        section("Loss", loss_chart(steps, held_out)),
        *(section(title, curve(steps, key, unit)) for title, (key, unit) in CURVES.items()),
        *samples(held_out),
        *events(info),
        section("Rows", table([], facts(info["data"]), plain=True)),
        section("Settings", note(f"repeat it: ftkit train --config {run.path}/config.toml DATA")),
        table(["option", "value"], facts(info["settings"]), plain=True),
        section("Versions", table([], facts(info["versions"]), plain=True)),
    ]
    title = f"{info['model']['id']}: {info['settings']['targets']}, rank {info['settings']['r']}"
    if info["plan"] and info["settings"]["full"]:
        title = f"{info['model']['id']}: every weight"
    run.write_text("report.html", page(title, f"{run.path}, trained by ftkit {info['versions']['ftkit']}", *parts))


def result_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know first."""
    rows = [("training loss", f"{info['first_loss']:.3f} → {info['last_loss']:.3f} nats per token")]
    if info["valid_loss"] is not None:
        rows.append(("held-out loss", f"{info['valid_loss_before']:.3f} → {info['valid_loss']:.3f} nats per token"))
    if "valid_accuracy" in info:
        rows.append(("held-out accuracy", f"{info['valid_accuracy']:.1%}, macro-F1 {info['valid_macro_f1']:.3f}"))
    if "best_step" in info:
        rows.append(("kept", f"step {info['best_step']:,} of {info['steps']:,}: the lowest held-out loss"))
    share = info["trainable"] / info["parameters"]
    rows += [
        ("steps", f"{info['steps']:,} of {info['plan']['batch']} rows"),
        ("trained", f"{info['trainable']:,} of {info['parameters']:,} parameters ({share:.2%})"),
        ("time", f"{info['train_seconds']:,.0f} s, {info['tokens_per_second']:,.0f} tokens/s on {info['device']}"),
    ]
    if info.get("resumed_from"):
        rows.append(("interrupted", "and gone on with after step " + ", ".join(map(str, info["resumed_from"]))))
    return rows


def loss_chart(steps: Sequence[Line], held_out: Sequence[Line]) -> Html:
    """Training loss of every step, and the held-out loss where it was measured."""
    series = {"training": [(line["step"], line["loss"]) for line in steps]}
    if held_out:
        series["held out"] = [(line["step"], line["valid_loss"]) for line in held_out]
    return line_chart(series, "step", "nats per token")


def curve(steps: Sequence[Line], key: str, unit: str) -> Html:
    """One number over the steps."""
    factor = 1e-9 if key.endswith("_bytes") else 1.0
    return line_chart(
        {unit: [(line["step"], line[key] * factor) for line in steps if line.get(key) is not None]}, "step", unit
    )


def samples(held_out: Sequence[Line]) -> list[Html]:
    """The answers to the first held-out prompts, step by step; runs without --early-stop have none."""
    told = [line for line in held_out if line.get("samples")]
    if not told:
        return []
    count = len(told[0]["samples"])
    rows = [
        [f"step {line['step']:,}", columns({f"row {at + 1}": said(line["samples"][at]) for at in range(count)})]
        for line in told
    ]
    return [section("Answers to held-out prompts", table([], rows, plain=True))]


def events(info: dict[str, Any]) -> list[Html]:
    """What was out of the ordinary, if anything."""
    found = info.get("events", [])
    rows = [(f"step {event['step']:,}", event["what"]) for event in found]
    return [section("Out of the ordinary", table([], rows, plain=True))] if rows else []


def facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, those left out that say nothing."""
    return [(name.replace("_", " "), str(value)) for name, value in values.items() if value not in (None, "", False)]
