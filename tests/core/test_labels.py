import random

import numpy as np
import pytest

from ftkit.core.labels import NO_LABEL, confusion, label_counts, label_in, macro_f1

CLASSES = ["bad", "good", "so so"]


def test_accuracy_macro_f1_and_confusion_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for _ in range(20):
        truths = [*CLASSES, *draw.choices(CLASSES, weights=[8, 1, 3], k=50)]
        found = [draw.choice([truth, *CLASSES, None]) for truth in truths]
        sums = np.array([label_counts(*pair, CLASSES) for pair in zip(truths, found, strict=True)]).sum(axis=0)
        named = [label or NO_LABEL for label in found]
        expected = metrics.f1_score(truths, named, labels=CLASSES, average="macro", zero_division=0)
        assert macro_f1(sums[:, None])[0] == pytest.approx(expected)
        table = metrics.confusion_matrix(truths, named, labels=[*CLASSES, NO_LABEL])[:-1]
        assert confusion(truths, found, CLASSES) == table.tolist()


def test_macro_f1_by_hand():
    """bad: 1 of 2 found and 1 of 1 right: 2/3; good: all: 1; so so occurs nowhere."""
    rows = [("bad", "bad"), ("bad", None), ("good", "good")]
    sums = np.array([label_counts(*row, CLASSES) for row in rows]).sum(axis=0)
    assert macro_f1(sums[:, None])[0] == pytest.approx((2 / 3 + 1) / 2)


def test_a_text_is_a_label_in_any_case_but_not_with_more_words():
    assert label_in(" Good\n", CLASSES) == "good" and label_in("SO SO", CLASSES) == "so so"
    assert label_in("good!", CLASSES) is None and label_in("very good", CLASSES) is None
