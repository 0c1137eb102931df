"""What is scored: the model, the run or the base that it came from, the rows, and the template that both must share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ftkit import console
from ftkit.core.eval_settings import EvalSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import sha256_of_file
from ftkit.io.base_model import find_base, weights_sha256
from ftkit.io.card import read_card
from ftkit.io.records import Kind
from ftkit.io.row_file import RowFile, read_row_file
from ftkit.io.run_folder import open_run, require_latest
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, template_of_rows
from ftkit.io.trained import Trained, open_trained, open_trained_run

SCORED: tuple[Kind, ...] = ("prompt_completion", "messages", "text", "classification", "preference")


def find_subject(settings: EvalSettings) -> Trained:
    """The model, the run or the adapter that was named; else the run that completed last."""
    if settings.model:
        return open_trained(settings.model)
    if settings.run is None:
        return open_trained_run(require_latest())
    return open_named(settings.run)


def open_named(name: str) -> Trained:
    """A run by its folder, or an adapter or model that was made elsewhere."""
    named = Path(name)
    is_made_elsewhere = named.is_dir() and not (named / "run.json").is_file()
    return open_trained(name) if is_made_elsewhere else open_trained_run(open_run(name))


def open_rival(name: str) -> Trained:
    """What --against names: a run, an adapter, a model folder or a Hugging Face id."""
    return open_trained(name)


def read_rows(settings: EvalSettings, trained: Trained) -> RowFile:
    """DATA, or the rows that the run held out, of any kind; answers with a label alone have nothing to compare with."""
    data = read_row_file(find_rows(settings, trained), "eval", kinds=SCORED)
    for row, place in zip(data.rows, data.places, strict=True):
        if data.kind == "preference" and "completion" in row:
            hint = "eval compares pairs: prompt, chosen, rejected; or score the good answers alone, without 'label'"
            raise UserError(f"{place}: one answer and its label are no pair", ExitCode.DATA, hint=hint)
    warn_of_missing_system(data, trained)
    return data


def warn_of_missing_system(data: RowFile, trained: Trained) -> None:
    """Rows are asked as they stand: conversations without the system message of training score another task."""
    if trained.card is None or trained.card.system is None or data.kind != "messages":
        return
    if missing := sum(row["messages"][0]["role"] != "system" for row in data.rows):
        rows = f"{missing:,} of {len(data.rows):,} conversations have no system message"
        console.warn(
            f"{data.source}: {rows}, {trained.name} was trained with one: {console.shortened(trained.card.system)}"
        )


def refuse_base_of_head(settings: EvalSettings, trained: Trained) -> None:
    """The untuned base of a model with a head for classes has none: it tells no label, and no text can be forgotten."""
    asked = "--baseline" if settings.baseline else "--forgetting" if settings.forgetting else None
    if trained.classes and asked:
        what = f"{asked}: the untuned base of {trained.name} has no head for classes"
        raise UserError(what, ExitCode.USAGE, hint="compare with another run: --against RUN")


def require_fitting_head(trained: Trained, others: Sequence[Trained], data: RowFile) -> None:
    """A head for classes needs rows of text and label, and what is compared with it tells the same labels."""
    for other in others:
        if other.classes != trained.classes:
            what = f"{other.name} and {trained.name} do not tell the same labels"
            raise UserError(what, ExitCode.DATA, hint="compare models with a head for the same labels, or without one")
    if trained.classes and data.kind != "classification":
        what = f"{data.places[0]}: rows of {data.kind}; {trained.name} tells labels"
        raise UserError(
            what, ExitCode.DATA, hint='{"text": "...", "label": "..."}: ftkit prep FILE --template classify'
        )


def find_rows(settings: EvalSettings, trained: Trained) -> str:
    """DATA, or the rows that the run held out."""
    if settings.data:
        return settings.data[0]
    if trained.run is None:
        raise UserError(f"no rows to score {trained.name} on", ExitCode.USAGE, hint="ftkit eval rows.jsonl --model ...")
    if not trained.run.valid.is_file() or trained.run.valid.stat().st_size == 0:
        hint = "name rows: ftkit eval rows.jsonl"
        raise UserError(f"{trained.name}: the run held no rows out", ExitCode.DATA, hint=hint)
    return str(trained.run.valid)


def base_of(trained: Trained, flag: str) -> Trained:
    """The untuned base as a model of its own; what was made from nothing has none. `flag` is the option that asks."""
    init = trained.run.read_info().get("settings", {}).get("init") if trained.run else None
    if init or (trained.adapter is None and trained.card is None):
        why = "was trained from scratch" if init else "is no run and no adapter"
        what = f"{flag}: {trained.name} {why}, so it has no untuned base"
        raise UserError(what, ExitCode.USAGE, hint="leave it out")
    if trained.adapter is not None or trained.card is None:
        return replace(trained, adapter=None, card=None, run=None)
    card = trained.card
    if card.method == "merged" and card.base_weights_sha256 is not None and not card.base.startswith("builtin:"):
        beside = read_card(trained.base.folder.with_name("adapter")) if trained.base.folder else None
        if beside is None or beside.base_weights_sha256 != card.base_weights_sha256:
            what = f"{flag}: {trained.name} has the name of its base ({card.base}), not where it lies"
            raise UserError(what, ExitCode.USAGE, hint="leave it out; --against FOLDER compares with any model")
        card = beside
    base = find_base(card.base if card.base.startswith("builtin:") else card.base_location, card.base_revision)
    return open_trained(base.location)


def identity_of(trained: Trained) -> list[str | None]:
    """What decides a model's answers: its base's weights, and its adapter's."""
    weights = (
        weights_sha256(trained.base) if trained.base.folder else f"{trained.base.location}@{trained.base.revision}"
    )
    adapter = sha256_of_file(trained.adapter / "adapter_model.safetensors") if trained.adapter else None
    return [weights, adapter]


def settle_template(settings: EvalSettings, data: RowFile, trained: Trained) -> Template | None:
    """The template of the rows, which must be the one that training saw: other prompts score another task.

    Templates of pairs and of classes shape rows, not prompts: they are nobody's.
    """
    given = load_template(settings.template) if settings.template else None
    rows_have = data.template
    if data.kind == "classification":
        return None
    if data.kind == "preference" and rows_have:
        is_given = given is not None and given.fingerprint == rows_have
        if template_of_rows(rows_have, given if is_given else None).kind == "preference":
            rows_have, given = None, None if is_given else given
    if trained.card is None:
        return template_of_rows(rows_have, given) if rows_have else given
    learned = trained.card.template
    run_has = trained.card.template_fingerprint
    if given is not None and given.fingerprint != (rows_have or run_has):
        raise mismatch(f"--template is {given.fingerprint}", rows_have or run_has, trained)
    if rows_have is None or rows_have == run_has:
        return learned or given
    if run_has is None and data.kind != "messages":
        console.info(f"the rows were made with {rows_have}; {trained.name} does not say what it was trained with")
        return template_of_rows(rows_have, given)
    raise mismatch(f"{data.source}: the rows were made with template {rows_have}", run_has, trained)


def mismatch(what: str, expected: str | None, trained: Trained) -> UserError:
    """The error for rows of another template than the one of training."""
    name = expected.partition("@")[0] if expected else None
    hint = f"make the rows again: ftkit prep FILE --template {name}" if name else "use rows without a template"
    return UserError(f"{what}, {trained.name} was trained with {expected or 'none'}", ExitCode.DATA, hint=hint)
