"""Measuring a segmenter on labelled images, at the images' own resolution. Changes no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wsiseg.classes import IGNORE
from wsiseg.datasets.base import LabelledDataset, LabelledImage, numbered_as
from wsiseg.errors import UsageError
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.training.calibration import Reliability
from wsiseg.training.findings import filled, found_labels, found_objects, without_small
from wsiseg.training.metrics import Matrix, confusion_matrix, pixel_metrics
from wsiseg.training.objects import ObjectScores, object_scores, pool
from wsiseg.training.sliding import Prediction, predict_image

PIXEL = ("accuracy", "dice", "miou", "f1")


@dataclass(frozen=True)
class Measuring:
    """How a model is measured."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise; probabilities are averaged over them."""
    tta: bool = False
    """Whether to average over the eight flips and quarter turns."""
    min_object_um2: float = 0.0
    """Predicted objects below this area are left out of the object scores."""
    fill_holes: bool = False
    """Whether holes of predicted objects are filled before the object scores."""
    raw: bool = False
    """Whether to measure without the post-processing that belongs to the model."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_object_um2) and self.min_object_um2 >= 0):
            raise UsageError(
                f"objects of at least {self.min_object_um2} um\u00b2: must be a finite number"
                " from 0"
            )


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        pixel: metrics of the one pooled confusion matrix, see `pixel_metrics`.
        per_image: metrics of each image that has a labelled pixel, by name: accuracy, dice, miou,
            f1, and where there are such: object_f1, object_dice, object_hausdorff, uncertainty
            (its mean).
        object: pooled object scores and their means, see `objects.pool`, and hausdorff_um; None
            without instances.
        how: as it was measured.
        calibration: how far the probabilities can be trusted, see `Reliability.summary`; None
            where that was not measured.
    """

    pixel: dict[str, Any]
    per_image: dict[str, dict[str, float]]
    object: dict[str, Any] | None = None
    how: Measuring = Measuring()
    calibration: dict[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """The pooled metrics and the means of the per-image ones, ready for JSON."""
        rows = list(self.per_image.values())
        means = {n: float(np.mean([r[n] for r in rows])) if rows else 0.0 for n in PIXEL}
        return {
            "images": len(rows),
            "pixel": self.pixel,
            "per_image": means,
            "object": self.object,
        }


@dataclass
class _Tally:
    """What is summed over the images."""

    matrix: Matrix
    reliability: Reliability = field(default_factory=Reliability)
    objects: list[ObjectScores] = field(default_factory=list)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate(
    segmenter: Segmenter,
    dataset: LabelledDataset,
    *,
    indices: Sequence[int] | None = None,
    how: Measuring | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare predictions with the labels of a data set.

    Args:
        segmenter: a model with the classes of the data set, in any order and case.
        dataset: labelled images; one is held at a time.
        indices: which images; default all.
        how: seeds, views and what counts as an object.
        progress: called with (images done, images in all).

    Raises:
        DatasetError: classes that are not those of the model; images that cannot be read.
    """
    dataset = numbered_as(dataset, segmenter.info.classes)
    how = how or Measuring()
    wanted = range(len(dataset)) if indices is None else indices
    count = len(dataset.classes)
    tally = _Tally(np.zeros((count, count), np.int64))
    for done, index in enumerate(wanted, start=1):
        item = dataset[index]
        prediction = predict_item(segmenter, dataset, item, how)
        _add(tally, item, prediction, segmenter.info, mpp=dataset.mpp, how=how)
        if progress is not None:
            progress(done, len(wanted))
    pixel = pixel_metrics(tally.matrix, dataset.classes)
    objects = None
    if tally.objects:
        objects = pool(tally.objects)
        objects["hausdorff_um"] = objects["hausdorff"] * dataset.mpp
    calibration = tally.reliability.summary() if tally.reliability.pixels else None
    return Evaluation(pixel, tally.rows, objects, how, calibration)


def predict_item(
    segmenter: Segmenter, dataset: LabelledDataset, item: LabelledImage, how: Measuring
) -> Prediction:
    """The prediction of an image of a data set, at its own resolution."""
    ratio = dataset.mpp / segmenter.info.mpp
    return predict_image(segmenter, item.image, ratio=ratio, seeds=how.seeds, tta=how.tta)


def _add(
    tally: _Tally,
    item: LabelledImage,
    prediction: Prediction,
    info: ModelInfo,
    *,
    mpp: float,
    how: Measuring,
) -> None:
    """Count an image of a resolution."""
    predicted = found_labels(prediction, info, mpp=mpp, raw=how.raw)
    matrix = confusion_matrix(item.mask, predicted, len(info.classes))
    if not matrix.any():
        return
    tally.matrix += matrix
    tally.reliability.add(prediction.probabilities, item.mask)
    metrics = pixel_metrics(matrix, info.classes)
    row = {name: float(metrics[name]) for name in PIXEL}
    if prediction.uncertainty is not None:
        row["uncertainty"] = float(prediction.uncertainty.mean())
    if item.instances is not None:
        if how.fill_holes:
            predicted = filled(predicted, info.classes)
        ignored = item.mask == IGNORE
        found = found_objects(predicted, prediction, info, mpp=mpp, ignored=ignored, raw=how.raw)
        found = without_small(found, float(np.rint(how.min_object_um2 / mpp**2)))
        scores = object_scores(found, np.where(ignored, 0, item.instances))
        tally.objects.append(scores)
        row |= {
            "object_f1": scores.f1,
            "object_dice": scores.dice,
            "object_hausdorff": scores.hausdorff,
        }
    tally.rows[item.name] = row
