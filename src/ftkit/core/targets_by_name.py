"""`--targets` for the layer names of Llama and its kin, without a model: what the closed form needs."""

from ftkit.errors import ExitCode, UserError, did_you_mean

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = ATTENTION + MLP
HEAD = "lm_head"
KEYWORDS = {"all-linear": LAYERS, "attention": ATTENTION, "mlp": MLP}


def named_targets(spec: str, *, is_tied: bool) -> frozenset[str]:
    """`all-linear,lm_head` -> names of layers; a name that no layer has is exit 4, as in `resolve_targets`."""
    chosen: set[str] = set()
    for word in filter(None, (part.strip() for part in spec.split(","))):
        if word == "auto":
            word = "all-linear"
        if word not in KEYWORDS and word not in (*LAYERS, HEAD):
            near = did_you_mean(word, [*LAYERS, HEAD, *KEYWORDS])
            hint = f"{near}this model has {', '.join((*LAYERS, HEAD))}; or {', '.join(KEYWORDS)}"
            raise UserError(f"--targets: no linear layer is called '{word}'", ExitCode.MODEL, hint=hint)
        chosen |= set(KEYWORDS.get(word, (word,)))
    if not chosen:
        raise UserError("--targets names no layer", ExitCode.MODEL, hint=f"for example {', '.join(KEYWORDS)}")
    if HEAD in chosen and is_tied:
        raise UserError(
            f"--targets: {HEAD} shares its weight with the input embedding; an adapter on it could not be merged",
            ExitCode.MODEL,
            hint="leave it out: --targets all-linear",
        )
    return frozenset(chosen)
