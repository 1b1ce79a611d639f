"""Pixel metrics from confusion matrices. Knows no networks and no files.

Definitions (one matrix, of an image or pooled over a set; ignored pixels left out): accuracy is
micro; Dice and IoU are computed per class and averaged over the classes that occur in truth or
prediction. Of a class, Dice = 2 TP / (2 TP + FP + FN) is F1, so that "f1" is "dice" by definition
(macro F1 as scikit-learn counts it); both are given because published tables name both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, Classes

Matrix = npt.NDArray[np.int64]


def confusion_matrix(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], count: int) -> Matrix:
    """(C, C) pixel counts, rows = truth, columns = prediction; truth 255 is left out.

    Args:
        truth: (H, W) classes 0..C-1, 255 = ignore.
        predicted: (H, W) classes 0..C-1.
        count: C.
    """
    keep = truth != IGNORE
    index = truth[keep].astype(np.int64) * count + predicted[keep].astype(np.int64)
    return np.bincount(index.ravel(), minlength=count * count).reshape(count, count)


def pixel_metrics(
    matrix: Matrix, classes: Classes, *, only_labelled: bool = False
) -> dict[str, Any]:
    """Accuracy, Dice, IoU and F1 of a pooled matrix, with the per-class values.

    A class that occurs neither in truth nor in prediction has no value and is left out of the
    means; with `only_labelled`, so is one that does not occur in truth, whose Dice is 0 from the
    first pixel predicted.
    """
    hits = np.diag(matrix).astype(float)
    truth, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    per_class: dict[str, Mapping[str, float]] = {}
    for k, name in enumerate(classes.names):
        if truth[k] + predicted[k] == 0:
            continue
        per_class[name] = {
            "dice": 2 * hits[k] / (truth[k] + predicted[k]),
            "iou": hits[k] / (truth[k] + predicted[k] - hits[k]),
            "precision": hits[k] / predicted[k] if predicted[k] else 0.0,
            "recall": hits[k] / truth[k] if truth[k] else 0.0,
        }
    labelled = {name for k, name in enumerate(classes.names) if truth[k]}
    counted = [v for name, v in per_class.items() if name in labelled or not only_labelled]
    dice = float(np.mean([v["dice"] for v in counted])) if counted else 0.0
    miou = float(np.mean([v["iou"] for v in counted])) if counted else 0.0
    return {
        "accuracy": float(hits.sum() / max(1, matrix.sum())),
        "dice": dice,
        "miou": miou,
        "f1": dice,
        "per_class": per_class,
        "confusion": matrix.tolist(),
    }
