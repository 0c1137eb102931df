"""The folder that merge makes: where it may lie, when it is there already, its merge.json and its model card."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from ftkit import __version__, console
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import CONFIG, WEIGHTS
from ftkit.io.atomic import check_manifest, refuse_existing, sha256_of_file
from ftkit.io.base_model import Base, config_sha256, weights_sha256
from ftkit.io.card import Card

SCHEMA = "ftkit.merge/1"
REPORT = "merge.json"
WORDS = {"adapter": "adapter", "base": "base", "onto": "--onto", "dtype": "--dtype", "trained_on": "--trained-on"}


def merge_identity(adapter: Path, base: Base, onto: str, dtype: str, trained_on: str | None = None) -> dict[str, Any]:
    """What decides a merge's result: an output with the same identity is the same model. dtype, trained_on: as asked.

    No paths: the folder may be published, and the same merge elsewhere has the same bytes.
    """
    return {
        "adapter": {
            "sha256": sha256_of_file(adapter / WEIGHTS),
            "config_sha256": sha256_without_base(adapter / CONFIG),
        },
        "base": {
            "name": base.public_name,
            "revision": base.revision,
            "config_sha256": config_sha256(base),
            "weights_sha256": weights_sha256(base),
        },
        "onto": onto,
        "dtype": dtype,
        "trained_on": trained_on,
    }


def sha256_without_base(config: Path) -> str:
    """Of an adapter's config, whatever it calls its base and wherever that lies."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("base_model_name_or_path", None)
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def refuse_harm(out: Path, adapter: Path, base: Path) -> None:
    """Exit 4 for an output inside the adapter or the base, or around them: replacing it would take them along."""
    here = out.resolve()
    kept = {"adapter": adapter.resolve(), "base": base.resolve()}
    for name, folder in kept.items():
        if here == folder or folder in here.parents:
            raise UserError(f"{out}: inside the {name} itself ({folder})", ExitCode.MODEL, hint="give another -o")
    for name, folder in {**kept, "current folder": Path.cwd()}.items():
        if here == folder or here in folder.parents:
            raise UserError(f"{out}: holds the {name} ({folder})", ExitCode.MODEL, hint="give another -o")


def is_done(out: Path, identity: dict[str, Any], *, force: bool, unproven: bool = False) -> bool:
    """True if the output is there, whole, proven and of this identity; anything else there is exit 9 without `force`.

    unproven: it need not be proven.
    What is no merged model is not replaced even with `force`: it may be anything.
    """
    if not out.exists():
        return False
    report = read_report(out)
    if force:
        if not report and not is_empty_folder(out):
            raise UserError(
                f"{out}: not a merged model, so --force does not replace it", ExitCode.EXISTS, hint="give another -o"
            )
        return False
    if not report:
        refuse_existing(out, replace=False)
    fault = why_not_the_same(out, report, identity, unproven=unproven)
    if fault:
        hint = "--force replaces it, -o puts the new one elsewhere"
        raise UserError(f"{out} exists and {fault}", ExitCode.EXISTS, hint=hint)
    proven = "proven and" if report["proof"].get("proven") else "unproven,"
    console.info(f"{out}: there already, {proven} from the same adapter")
    return True


def is_empty_folder(path: Path) -> bool:
    """True for a folder with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def why_not_the_same(out: Path, report: dict[str, Any], identity: dict[str, Any], *, unproven: bool) -> str | None:
    """What keeps an existing output from being the one that is asked for, in words; None if it is."""
    other = [key for key, value in identity.items() if without_name(report.get(key)) != without_name(value)]
    if other:
        return f"is merged with another {' and another '.join(WORDS[key] for key in other)}"
    if not report.get("proof", {}).get("proven") and not (unproven and "proof" in report):
        return "is not proven"
    try:
        check_manifest(out)
    except UserError as error:
        return f"is damaged: {error.message}"
    return None


def without_name(value: Any) -> Any:
    """A part of an identity without what the folder was called: the same base may lie elsewhere."""
    return {key: item for key, item in value.items() if key != "name"} if isinstance(value, dict) else value


def read_report(folder: Path) -> dict[str, Any]:
    """merge.json of a folder; empty where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def write_report(folder: Path, report: dict[str, Any], base: Base, card: Card | None) -> None:
    """merge.json, and README.md made from it."""
    text = json.dumps({"schema": SCHEMA, **report}, indent=1, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(report, base, card), encoding="utf-8")


def model_card(report: dict[str, Any], base: Base, card: Card | None) -> str:
    """README.md of the merged folder, with the metadata that the Hugging Face hub reads."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base.folder is None:
        lines += [f"base_model: {base.name}", "base_model_relation: finetune"]
    lines += ["tags: [ftkit]", "---", "", f"# Merged with ftkit {__version__}", "", f"- base: `{base.public_name}`"]
    if card is not None:
        lines.append(f"- trained with: {card.method}, rows of up to {card.max_length} tokens")
    if card is not None and card.template_fingerprint:
        lines.append(f"- template: `{card.template_fingerprint}` (its text is in ftkit.json)")
    if card is not None and card.pattern:
        lines.append(f"- prompts look like: `{card.pattern}`")
    if report["live"] is not None:
        seen = {"trained": "the quantised values that training saw", "original": "the original, unquantised weights"}
        lines.append(f"- the adapter is added to {seen[report['onto']]}")
    lines += [*proof_lines(report["proof"]), "- details: merge.json"]
    return "\n".join(lines) + "\n"


def proof_lines(proof: dict[str, Any]) -> list[str]:
    """What the model card says of the proof."""
    if not proof["proven"]:
        return ["- UNPROVEN: merged with --no-check, never compared with base + adapter"]
    return [
        f"- proven equal to base + adapter on {proof['probes']} prompts ({proof['positions']} positions):",
        f"  largest logit difference {proof['largest_difference']:.2g} of {proof['largest_logit']:.3g},",
        f"  mean KL {proof['mean_kl']:.2g} nats, same likeliest token at {proof['agreement']:.1%},",
        f"  the same {proof['greedy_tokens']} tokens written greedily for {proof['same_greedy']} of {proof['probes']}",
    ]
