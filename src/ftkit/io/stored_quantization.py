"""Weights that a base's files hold quantised already: what its config says of them, read without torch."""

from typing import Any

from ftkit.errors import ExitCode, UserError

FOUR_BITS = {
    "nf4": ("nf4", False),
    "nf4-dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-dq": ("fp4", True),
}
"""How a base is held -> kind of number, and whether scales are quantised too (dq)."""
NEEDED_BY = {
    "gptq": "transformers opens such files with optimum and gptqmodel alone, which compiles kernels here at first use",
    "awq": "transformers opens such files with gptqmodel alone, which compiles kernels here at first use",
}


def stored_quantization(config: Any) -> dict[str, Any] | None:
    """What the config of a base says of weights that its files hold packed; None where they are plain numbers."""
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()


def kind_of_stored(stored: dict[str, Any], name: str) -> str:
    """How a base's files hold it: a key of FOUR_BITS, or int8. Exit 4 for what is not packed by bitsandbytes."""
    method = stored.get("quant_method")
    if method == "bitsandbytes" and stored.get("load_in_8bit"):
        return "int8"
    kind = f"{stored.get('bnb_4bit_quant_type', 'fp4')}{'-dq' if stored.get('bnb_4bit_use_double_quant') else ''}"
    if method == "bitsandbytes" and stored.get("load_in_4bit") and kind in FOUR_BITS:
        return kind
    what = f"{name}: is quantised already by {method or 'an unknown tool'}; ftkit trains on bitsandbytes' 4 and 8 bits"
    needs = NEEDED_BY.get(str(method))
    hint = "give the 16-bit model that it was made from, with --qlora or --load-in-8bit"
    raise UserError(f"{what}{f' ({needs})' if needs else ''}", ExitCode.MODEL, hint=hint)
