import random
from functools import partial

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from ftkit.core.scoring import each_column
from ftkit.core.translation_scores import (
    bleu_counts,
    bleu_of_counts,
    bleu_scorer,
    chrf_counts,
    chrf_of_counts,
    writes_without_spaces,
)  # fmt: skip
from ftkit.errors import ExitCode, UserError

WORDS = ["the", "cat", "sat", "on", "a", "mat", ",", "and", "then", "it", "slept", ".", "Who", "knew", "?"]
SIGNS = "我你他是不在有人的了去来好大家，。"


def sentences(letters, joined, seed=0, count=40):
    draw = random.Random(seed)
    references = [joined.join(draw.choices(letters, k=draw.randint(1, 15))) for _ in range(count)]
    answers = [
        joined.join(draw.choices(letters, k=3)) + joined + text[: draw.randint(0, len(text))] for text in references
    ]
    return ["", *answers], ["the", *references]


@pytest.mark.parametrize(("language", "letters", "joined"), [(None, WORDS, " "), ("de", WORDS, " "), ("zh", SIGNS, "")])
def test_corpus_scores_from_added_counts_are_those_of_sacrebleu(language, letters, joined):
    answers, references = sentences(letters, joined)
    pairs = list(zip(answers, references, strict=True))
    bleu = bleu_of_counts(np.array([bleu_counts(*pair, language) for pair in pairs]).sum(axis=0))
    assert bleu == pytest.approx(BLEU(trg_lang=language or "").corpus_score(answers, [references]).score, abs=1e-12)
    assert 0 < bleu < 100
    chrf = chrf_of_counts(np.array([chrf_counts(*pair) for pair in pairs]).sum(axis=0))
    assert chrf == pytest.approx(CHRF().corpus_score(answers, [references]).score, abs=1e-12)


def test_scores_of_single_sentences_are_those_of_sacrebleu():
    for answer, reference in zip(*sentences(WORDS, " ", seed=1, count=10), strict=True):
        ours = bleu_of_counts(np.array(bleu_counts(answer, reference, None)), single=True)
        assert ours == pytest.approx(BLEU(effective_order=True).sentence_score(answer, [reference]).score)
        assert chrf_of_counts(np.array(chrf_counts(answer, reference))) == pytest.approx(
            CHRF().sentence_score(answer, [reference]).score
        )


def test_bleu_by_hand():
    """the cat sat / the cat sat on: n-grams 3/3, 2/2, 1/1, none of 4; brevity exp(1 - 4/3)."""
    counts = bleu_counts("the cat sat down", "the cat sat on a mat", None)
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 (smoothed to 1/2); as long as 4 of 6 words
    assert bleu_of_counts(np.array(counts)) == pytest.approx(
        100 * np.exp(1 - 6 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)
    )


def test_every_draw_of_the_bootstrap_gets_its_own_score():
    counts = np.array([chrf_counts("a cat", "the cat"), chrf_counts("dog", "cat")]).T
    assert each_column(chrf_of_counts, counts).tolist() == [chrf_of_counts(counts[:, 0]), chrf_of_counts(counts[:, 1])]


def test_the_language_decides_how_bleu_cuts_words():
    zh = partial(bleu_counts, "我在家。", "我在家里。")
    assert zh("zh")[1] == 5 and zh(None)[1] == 1  # five signs, or one word


def test_a_language_that_is_none_and_one_whose_tokenizer_is_missing():
    with pytest.raises(UserError) as error:
        bleu_scorer("Chinese")
    assert error.value.exit_code == ExitCode.USAGE
    try:
        import MeCab  # noqa: F401
    except ImportError:
        with pytest.raises(UserError) as error:
            bleu_scorer("ja")
        assert error.value.exit_code == ExitCode.ENVIRONMENT and "pip install 'sacrebleu[ja]'" in error.value.hint


def test_which_texts_are_written_without_spaces():
    assert writes_without_spaces(["你好 a", "ภาษาไทย"]) and writes_without_spaces(["ひらがな"])
    assert not writes_without_spaces(["Привет, мир", "hello 你"]) and not writes_without_spaces(["", "12"])
