"""Rows of classes: accuracy, macro-F1 and confusion of predicted labels.

Legend: C classes, K draws.
"""

from collections.abc import Sequence

import numpy as np

from ftkit.core.bootstrap import Floats

NO_LABEL = "(none of them)"
"""What an answer counts as that is none of the labels."""


def label_in(text: str, classes: Sequence[str]) -> str | None:
    """The label that a generated text is, in any case and with space around it; None if it is none of them."""
    wanted = text.strip().casefold()
    return next((label for label in classes if label.strip().casefold() == wanted), None)


def label_counts(truth: str, predicted: str | None, classes: Sequence[str]) -> tuple[float, ...]:
    """What one row adds to macro-F1: (3 C) how often each class is true, is predicted, is both."""
    is_true = [float(label == truth) for label in classes]
    is_predicted = [float(label == predicted) for label in classes]
    return (*is_true, *is_predicted, *(a * b for a, b in zip(is_true, is_predicted, strict=True)))


def macro_f1(sums: Floats) -> Floats:
    """Mean over classes of 2 |true and predicted| / (|true| + |predicted|), from sums (3 C, K); -> (K,).

    A class that is neither true nor predicted anywhere has no part in the mean (as in scikit-learn's f1_score).
    """
    true, predicted, both = np.split(sums, 3)  # each (C, K)
    seen = true + predicted
    f1 = np.divide(2 * both, seen, out=np.zeros_like(seen), where=seen > 0)
    result: Floats = f1.sum(axis=0) / np.maximum(1, (seen > 0).sum(axis=0))
    return result


def confusion(truths: Sequence[str], predicted: Sequence[str | None], classes: Sequence[str]) -> list[list[int]]:
    """Rows: the true class; columns: the predicted one, in the order of the classes, answers that are none of them last."""
    place = {label: number for number, label in enumerate(classes)}
    table = [[0] * (len(classes) + 1) for _ in classes]
    for truth, found in zip(truths, predicted, strict=True):
        table[place[truth]][len(classes) if found is None else place[found]] += 1
    return table
