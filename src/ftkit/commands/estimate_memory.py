"""estimate-memory: how much memory training would take, by running its step without weights and without a GPU."""

from dataclasses import replace
from typing import Any

from ftkit import console
from ftkit.commands.estimate_model import Model, read_model, settle_quantization
from ftkit.commands.estimate_report import Answer, as_json, compare_table, in_gib, show, write_json
from ftkit.commands.estimate_run import Estimates, Verdict, is_clear, process_bytes, verdict
from ftkit.commands.estimate_search import Suggestion, largest, settings_that_fit, suggest, train_command
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import GPUS, Gpu, find_gpu
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.model_settings import METHOD_FLAGS
from ftkit.core.planned_run import with_padded_rows
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import say_default

IGNORES_PACKS = "this architecture takes no packs: padded rows are estimated, as in training"
METHODS: tuple[dict[str, Any], ...] = ({"full": True}, {"lora": True}, {"load_in_8bit": True}, {"qlora": True})


def run(settings: EstimateSettings) -> None:
    """Say what training with these settings takes; exit 5 if the card that was named is too small."""
    gpu = find_gpu(settings.gpu) if settings.gpu else find_gpu(settings.fit, "--fit") if settings.fit else None
    say_default(settings.model)
    model = read_model(settings)
    settings = settle_quantization(settings, model)
    if settings.measure:
        from ftkit.commands.estimate_measure import measure

        measure(settings, model)
        return
    estimates = Estimates(model)
    if settings.compare:
        compare(estimates, settings, gpu)
        return
    rows = with_rows(estimates, settings) if settings.data else None
    if settings.fit and gpu:
        settings = fitted(estimates, settings, gpu)
    answer = find_answer(estimates, settings, gpu, rows)
    say([answer])
    if settings.json:
        write_json(as_json(answer))
    else:
        show(answer)
    refuse_too_small(answer)


def find_answer(
    estimates: Estimates, settings: EstimateSettings, gpu: Gpu | None, rows: dict[str, int] | None
) -> Answer:
    """The estimate, its verdict, and what else one may want to know of the card."""
    settled = estimates.with_settled_checkpointing(settings, gpu)
    estimate = estimates.exact(settled, gpu)
    found = exact_verdict(estimates, settled, gpu, estimate) if gpu else None
    plan = estimates.plan(settled, gpu)
    is_too_small = found is not None and found.word == "no"
    return Answer(
        settings=settings,
        model=estimates.model,
        plan=with_padded_rows(plan, settled) if estimate.ignores_packs else plan,
        estimate=estimate,
        gpu=gpu,
        verdict=found,
        cards=[] if gpu else [(card, estimates.judge(settings, card)) for card in GPUS.values()],
        suggestions=suggest(estimates, settled, gpu, found) if gpu and found and is_too_small else [],
        largest=largest(estimates, settled, gpu) if gpu and not is_too_small and rows is None else None,
        rows=rows,
        notes=notes_on(settings, estimates.model, gpu) + ([IGNORES_PACKS] if estimate.ignores_packs else []),
        warnings=warnings_on(settings, estimates.model, gpu) + near_limit(found, gpu),
        command=train_command(settled) if settings.fit else None,
    )


def exact_verdict(estimates: Estimates, settings: EstimateSettings, gpu: Gpu, estimate: MemoryEstimate) -> Verdict:
    """The verdict on the very estimate that is shown."""
    found = verdict(process_bytes(estimate, gpu), gpu, settings, is_rough=estimate.expected_error is not None)
    return estimates.with_less_cache(settings, gpu, found) if found.word == "no" and not found.is_rough else found


def with_rows(estimates: Estimates, settings: EstimateSettings) -> dict[str, int]:
    """Let the estimates know the real rows; what they amount to."""
    from ftkit.commands.estimate_data import read_data

    estimates.rows = read_data(settings, estimates.model)
    facts: dict[str, int] = estimates.rows.facts
    return facts


def fitted(estimates: Estimates, settings: EstimateSettings, gpu: Gpu) -> EstimateSettings:
    """Settings that the card holds; exit 5 if there are none."""
    found = settings_that_fit(estimates, settings, gpu)
    if found is None:
        raise UserError(
            f"nothing fits {gpu.name}: not even 4 bits with rows of a few hundred tokens",
            ExitCode.MEMORY,
            hint="take a smaller model or a larger card",
        )
    return found


def compare(estimates: Estimates, settings: EstimateSettings, gpu: Gpu | None) -> None:
    """One row a method, other settings being equal; exit 5 if the card that was named holds none of them."""
    found: list[tuple[Answer, str]] = []
    if settings.dtype == "fp16":
        console.info("full training is estimated with --dtype auto: fp16 is too narrow for it")
    for method in METHODS:
        changed = replace(settings, **dict.fromkeys(METHOD_FLAGS, False) | method)
        if method.get("full") and changed.dtype == "fp16":
            changed = replace(changed, dtype="auto")
        settled = estimates.with_settled_checkpointing(changed, gpu)
        estimate = estimates.exact(settled, gpu)
        judged = exact_verdict(estimates, settled, gpu, estimate) if gpu else None
        answer = Answer(changed, estimates.model, estimates.plan(settled, gpu), estimate, gpu, judged, [], [], None, None,
                        notes_on(changed, estimates.model, gpu), warnings_on(changed, estimates.model, gpu), None)  # fmt: skip
        found.append((answer, smallest_card(estimates, changed)))
    say([answer for answer, _ in found])
    if settings.json:
        rows = [as_json(answer) | {"smallest_card": card} for answer, card in found]
        write_json({"schema": "ftkit.estimates/1", "methods": rows})
    else:
        compare_table(found)
    if gpu and all(answer.verdict and answer.verdict.word == "no" for answer, _ in found):
        hint = f"ftkit estimate-memory with --fit {settings.gpu} looks for settings that do"
        raise UserError(f"none of the methods fits {gpu.name} with these settings", ExitCode.MEMORY, hint=hint)


def smallest_card(estimates: Estimates, settings: EstimateSettings) -> str:
    """The smallest card of the table that holds a run, and whether it takes checkpointing."""
    for card in sorted(GPUS.values(), key=lambda card: card.usable_bytes):
        judged = estimates.judge(settings, card)
        if judged.word == "fits":
            return card.name + (", checkpointing" if judged.checkpointing else "")
    return "none of the table"


# ---------------------------------------------------------------- what is said about it
def say(answers: list[Answer]) -> None:
    """Notes and warnings, each once."""
    for note in dict.fromkeys(note for answer in answers for note in answer.notes):
        console.info(note)
    for warning in dict.fromkeys(warning for answer in answers for warning in answer.warnings):
        console.warn(warning)


def notes_on(settings: EstimateSettings, model: Model, gpu: Gpu | None) -> list[str]:
    """What is estimated otherwise than one may expect."""
    notes, context = [], model.context
    if context is not None and settings.max_length > context:
        notes.append(
            f"--max-length {settings.max_length} is beyond the model's context: {context} tokens, as in training"
        )
    if gpu and not gpu.has_flash_attention:
        notes.append(f"{gpu.name} has no FlashAttention-2: memory-efficient attention is estimated")
    if settings.gpus > 1:
        notes.append(
            "ftkit trains on one card: this says what one of several would hold in a framework that shares the work"
        )
    return notes


def warnings_on(settings: EstimateSettings, model: Model, gpu: Gpu | None) -> list[str]:
    """What training would refuse on the card, and what is approximate."""
    warnings = []
    if gpu and not gpu.has_bf16 and settings.dtype == "bf16":
        warnings.append(f"{gpu.name} cannot compute in bf16, training would refuse; --dtype auto takes fp16 there")
    if experts := model.experts:
        warnings.append(
            f"a mixture of {experts} experts, so approximate: the tensors of three such runs on a CPU came to 1 to 12 % less than"
            " estimated, and no card was at hand. Counted are all pairs of a token and an expert, whichever they are; experts"
            " stay in 16 bits, without adapters"
        )
    return warnings


def near_limit(found: Verdict | None, gpu: Gpu | None) -> list[str]:
    """The closed form's verdict on a run that the card just holds, or just does not."""
    if gpu is None or found is None or not found.is_rough or is_clear(found.process_bytes, gpu):
        return []
    return [f"near the limit of {gpu.name}: what the allocator's holes add is not known here; a simulation would tell"]


def refuse_too_small(answer: Answer) -> None:
    """Exit 5 if the card that was named does not hold the run."""
    gpu, found = answer.gpu, answer.verdict
    if gpu and found and found.word == "no":
        raise UserError(
            f"does not fit: training needs {in_gib(found.process_bytes)}, {gpu.name} has {in_gib(gpu.usable_bytes)}",
            ExitCode.MEMORY,
            hint=hint_of(answer.suggestions),
        )


def hint_of(suggestions: list[Suggestion]) -> str:
    """The change that costs least and is enough; without one, what is left to do."""
    enough = [each for each in suggestions if each.fits]
    if enough:
        return f"{enough[-1].change} brings it to {in_gib(enough[-1].process_bytes)}"
    return "none of the changes is enough: take a smaller model or a larger card"
