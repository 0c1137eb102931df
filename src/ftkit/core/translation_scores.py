"""BLEU and chrF by sacrebleu, from the counts of each answer, so that rows can be added up in any combination.

BLEU: Papineni et al., ACL 2002, section 2; sacrebleu's tokenizers and exponential smoothing (Post, WMT 2018).
chrF: Popović, WMT 2015, section 2: character n-grams up to 6, recall weighing twice. Both from 0 to 100.
"""

import re
from functools import cache
from typing import Any

from ftkit.core.bootstrap import Floats
from ftkit.errors import ExitCode, UserError

LANGUAGE = re.compile("[a-z]{2,3}")
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of writing systems without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def writes_without_spaces(texts: list[str]) -> bool:
    """True if most letters of these texts belong to a writing system without spaces between words."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return 2 * sum(bool(UNSPACED.match(letter)) for letter in letters) > len(letters)


@cache
def bleu_scorer(language: str | None, *, single: bool = False) -> Any:
    """sacrebleu's BLEU with the tokenizer for a language (`zh`, `ja`, `ko` have their own); `single`: for one sentence."""
    from sacrebleu.metrics.bleu import BLEU

    if language is not None and not LANGUAGE.fullmatch(language):
        raise UserError(f"--lang {language}: not a language code", ExitCode.USAGE, hint="--lang zh, ja, ko, de, ...")
    try:
        return BLEU(trg_lang=language or "", effective_order=single, force=True)
    except (ImportError, RuntimeError) as error:
        what = f"--lang {language}: BLEU needs a tokenizer that is not installed"
        hint = f"pip install 'sacrebleu[{language}]'"
        raise UserError(f"{what} ({str(error).splitlines()[0][:100]})", ExitCode.ENVIRONMENT, hint=hint) from None


@cache
def chrf_scorer() -> Any:
    """sacrebleu's chrF."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def bleu_counts(prediction: str, reference: str, language: str | None) -> tuple[float, ...]:
    """What one answer adds to corpus BLEU: lengths of answer and reference, then n-grams that match, then all n-grams."""
    [counts] = bleu_scorer(language)._extract_corpus_statistics([prediction], [[reference]])
    return tuple(map(float, counts))


def chrf_counts(prediction: str, reference: str) -> tuple[float, ...]:
    """What one answer adds to corpus chrF: for each order the n-grams of the answer, of the reference, of both."""
    [counts] = chrf_scorer()._extract_corpus_statistics([prediction], [[reference]])
    return tuple(map(float, counts))


def bleu_of_counts(counts: Floats, *, single: bool = False) -> float:
    """BLEU of added counts (10,); `single` as sacrebleu does for one sentence (orders without n-grams left out)."""
    return float(bleu_scorer(None, single=single)._compute_score_from_stats([round(count) for count in counts]).score)


def chrf_of_counts(counts: Floats) -> float:
    """chrF of added counts (18,)."""
    return float(chrf_scorer()._compute_score_from_stats(list(counts)).score)
