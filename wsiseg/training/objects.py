"""Object scores of two label maps, and objects of a mask. Knows no networks and no files.

The scores are those of the GlaS challenge (Sirinukunwattana et al. 2017): F1 of
detection, object-level Dice and object-level Hausdorff distance. An object's counterpart is the
object of the other map that lies under most of its pixels (of equal ones that with the smallest
id). A predicted object is a true positive if it covers more than half of its counterpart.
Object-level Dice and Hausdorff are half the sum of two means, one over the predicted and one over
the true objects, weighted by the objects' areas. An object over nothing but background has Dice 0
and, for Hausdorff, the nearest object (in the Hausdorff sense) as its counterpart.

Two maps without objects have F1 = Dice = 1 and Hausdorff 0. If only one map has objects, F1 and
Dice are 0; the challenge defines no distance there, and the longest distance in the image (its
diagonal between pixel centres) is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsiseg.errors import UsageError
from wsiseg.training.labelmaps import LabelMap, hausdorff

Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """Area-weighted sums over the objects of one of the two maps.

    Attributes:
        area: pixels of all objects.
        dice: sum of area * Dice.
        hausdorff: sum of area * Hausdorff distance in px.
    """

    area: int = 0
    dice: float = 0.0
    hausdorff: float = 0.0

    def __add__(self, other: Side) -> Side:
        return Side(
            self.area + other.area, self.dice + other.dice, self.hausdorff + other.hausdorff
        )


@dataclass(frozen=True)
class ObjectScores:
    """What an image (or, added up, a set of images) contributes to the object scores.

    Attributes:
        tp: predicted objects that cover more than half of their counterpart.
        fp: the other predicted objects.
        fn: true objects that no predicted object detects.
        predicted: sums over the predicted objects.
        truth: sums over the true objects.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    predicted: Side = field(default_factory=Side)
    truth: Side = field(default_factory=Side)

    def __add__(self, other: ObjectScores) -> ObjectScores:
        return ObjectScores(
            self.tp + other.tp,
            self.fp + other.fp,
            self.fn + other.fn,
            self.predicted + other.predicted,
            self.truth + other.truth,
        )

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 without any object."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else 1.0

    @property
    def dice(self) -> float:
        """Object-level Dice; 1 without any object."""
        means = [s.dice / s.area for s in (self.predicted, self.truth) if s.area]
        return sum(means) / len(means) if means else 1.0

    @property
    def hausdorff(self) -> float:
        """Object-level Hausdorff distance in px; 0 without any object."""
        means = [s.hausdorff / s.area for s in (self.predicted, self.truth) if s.area]
        return sum(means) / len(means) if means else 0.0


def object_scores(predicted: npt.NDArray[Any], truth: npt.NDArray[Any]) -> ObjectScores:
    """The object scores of one image.

    Args:
        predicted: (H, W) object ids of any integer type, 0 = no object; ids need not be
            consecutive, and the pixels of an object need not be connected.
        truth: the same for the reference.

    Raises:
        UsageError: maps that are no label maps, or differ in size.
    """
    if predicted.shape != truth.shape:
        raise UsageError(
            f"object scores: the maps differ in size, {predicted.shape} and {truth.shape}"
        )
    return _Comparison(LabelMap(predicted), LabelMap(truth)).scores()


def pool(scores: Sequence[ObjectScores]) -> dict[str, Any]:
    """Scores over a set of images.

    Returns:
        "f1", "dice" and "hausdorff" (px) over the objects of all images together, as the
        challenge ranks them; "tp", "fp", "fn"; and in "per_image" the means of the images' own
        "f1", "dice" and "hausdorff".

    Raises:
        UsageError: no images.
    """
    if not scores:
        raise UsageError("object scores: there is no image to score")
    total = sum(scores, ObjectScores())
    return {
        "f1": total.f1,
        "dice": total.dice,
        "hausdorff": total.hausdorff,
        "tp": total.tp,
        "fp": total.fp,
        "fn": total.fn,
        "per_image": {
            "f1": float(np.mean([s.f1 for s in scores])),
            "dice": float(np.mean([s.dice for s in scores])),
            "hausdorff": float(np.mean([s.hausdorff for s in scores])),
        },
    }


def objects_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Labels of the connected parts of a mask, for models without objects of their own.

    Pixels that touch at a corner belong together (8-connectivity).

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) int32 labels 1..n, 0 = none.

    Raises:
        UsageError: a mask that is not (H, W) bool.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise UsageError(f"objects: the mask must be (H, W) bool, not {mask.shape} {mask.dtype}")
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3), bool))
    return np.asarray(labels, np.int32)


class _Comparison:
    """Two maps of one size: their overlaps and distances."""

    def __init__(self, predicted: LabelMap, truth: LabelMap) -> None:
        self._predicted, self._truth = predicted, truth
        height, width = truth.labels.shape
        self._diagonal = math.hypot(height - 1, width - 1)
        self._known: dict[tuple[int, int], float] = {}

    def scores(self) -> ObjectScores:
        """The object scores of the image."""
        predicted, truth = self._predicted, self._truth
        both = (predicted.labels > 0) & (truth.labels > 0)
        pairs = predicted.labels[both].astype(np.int64) * (truth.count + 1) + truth.labels[both]
        found, shared = np.unique(pairs, return_counts=True)
        rows, columns = found // (truth.count + 1), found % (truth.count + 1)
        below, covered = _counterparts(rows, columns, shared, predicted.count)
        above, hidden = _counterparts(columns, rows, shared, truth.count)
        tp = int((2 * covered[1:] > truth.areas[below[1:]])[below[1:] > 0].sum())
        return ObjectScores(
            tp=tp,
            fp=predicted.count - tp,
            fn=truth.count - tp,
            predicted=self._side(predicted, truth, below, covered),
            truth=self._side(truth, predicted, above, hidden),
        )

    def _side(self, own: LabelMap, other: LabelMap, matches: Int, shared: Int) -> Side:
        """The sums over the objects of one map, given their counterparts in the other."""
        dice, hausdorff = 0.0, 0.0
        for number in range(1, own.count + 1):
            match, area = int(matches[number]), int(own.areas[number])
            if match:
                dice += area * 2 * int(shared[number]) / (area + int(other.areas[match]))
            distance = self._distance(own, number, match) if match else self._nearest(own, number)
            hausdorff += area * distance
        return Side(int(own.areas[1:].sum()), dice, hausdorff)

    def _distance(self, own: LabelMap, number: int, other_number: int) -> float:
        """Hausdorff distance in px of an object of one map and one of the other."""
        swapped = own is self._truth
        a, b = (other_number, number) if swapped else (number, other_number)
        if (a, b) not in self._known:
            self._known[a, b] = hausdorff(self._predicted, a, self._truth, b)
        return self._known[a, b]

    def _nearest(self, own: LabelMap, number: int) -> float:
        """The smallest Hausdorff distance in px of an object from all objects of the other map.

        The extents of two sets along an axis differ by no more than their Hausdorff distance,
        so the search can stop at the first object whose box differs by more than the best found.
        """
        other = self._truth if own is self._predicted else self._predicted
        bounds = np.abs(other.boxes[1:] - own.boxes[number]).max(axis=1)
        best = math.inf
        for index in np.argsort(bounds, kind="stable"):
            if bounds[index] >= best:
                break
            best = min(best, self._distance(own, number, int(index) + 1))
        return best if other.count else self._diagonal


def _counterparts(rows: Int, columns: Int, shared: Int, count: int) -> tuple[Int, Int]:
    """For each object 1..count the column with most shared pixels, and their number; 0 = none."""
    order = np.lexsort((columns, -shared, rows))
    owners, first = np.unique(rows[order], return_index=True)
    matches, pixels = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    matches[owners], pixels[owners] = columns[order][first], shared[order][first]
    return matches, pixels
