"""Objects of a label map and the exact distances between them. Knows no scores and no files."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from wsiseg.errors import UsageError

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


class LabelMap:
    """The objects of a label map, renumbered 1..n in the order of their ids.

    Attributes:
        labels: (H, W) int32 object numbers, 0 = none.
        count: n.
        areas: (n + 1,) pixels of each object, the background first.
        boxes: (n + 1, 4) first row, last row, first column, last column of each object.
    """

    def __init__(self, labels: npt.NDArray[Any]) -> None:
        """The objects of (H, W) ids: not negative, of any integer type, 0 = no object.

        Raises:
            UsageError: not such a map.
        """
        if labels.ndim != 2 or not labels.size or labels.dtype.kind not in "iu":
            raise UsageError(
                "object scores: a label map must be (H, W) whole numbers, "
                f"not {labels.shape} {labels.dtype}"
            )
        ids, inverse = np.unique(labels, return_inverse=True)
        if ids[0] < 0:
            raise UsageError(f"object scores: object ids must not be negative, found {ids[0]}")
        background = int(ids[0] == 0)
        self.count = len(ids) - background
        self.labels = inverse.reshape(labels.shape).astype(np.int32) + np.int32(1 - background)
        self.areas: Int = np.bincount(self.labels.ravel(), minlength=self.count + 1)
        self._slices = ndimage.find_objects(self.labels)
        boxes = [(y.start, y.stop - 1, x.start, x.stop - 1) for y, x in self._slices]
        self.boxes: Int = np.array([(0, 0, 0, 0), *boxes], np.int64)
        self._trees: dict[int, cKDTree] = {}
        self._outlines: dict[int, Int] = {}

    @cached_property
    def _edges(self) -> list[Int]:
        """(k, 2) y, x of each object's pixels with a side to another label or to the outside."""
        centre, inner = self.labels[1:-1, 1:-1], np.zeros(self.labels.shape, bool)
        inner[1:-1, 1:-1] = (
            (centre == self.labels[:-2, 1:-1])
            & (centre == self.labels[2:, 1:-1])
            & (centre == self.labels[1:-1, :-2])
            & (centre == self.labels[1:-1, 2:])
        )
        points = np.argwhere((self.labels > 0) & ~inner)
        owners = self.labels[points[:, 0], points[:, 1]]
        ends = np.cumsum(np.bincount(owners, minlength=self.count + 1))
        return np.split(points[np.argsort(owners, kind="stable")], ends[:-1])

    def distances(self, points: Int, number: int) -> Float:
        """Distances in px of (k, 2) points y, x that are not in an object from it.

        The nearest pixel of an object lies on its edge: from a pixel with all four neighbours
        in the object one could step nearer.
        """
        if number not in self._trees:
            self._trees[number] = cKDTree(self._edges[number])
        found: Float = self._trees[number].query(points)[0]
        return found

    def outline(self, number: int) -> Int:
        """(k, 2) y, x of an object's first and last pixels of each row and of each column."""
        if number not in self._outlines:
            rows, columns = self._slices[number - 1]
            own = self.labels[rows, columns] == number
            y, x = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
            first_x, last_x = own.argmax(axis=1), own.shape[1] - 1 - own[:, ::-1].argmax(axis=1)
            first_y, last_y = own.argmax(axis=0), own.shape[0] - 1 - own[::-1].argmax(axis=0)
            points = [(y, first_x[y]), (y, last_x[y]), (first_y[x], x), (last_y[x], x)]
            found = np.concatenate([np.stack(p, axis=1) for p in points])
            self._outlines[number] = found + np.array((rows.start, columns.start))
        return self._outlines[number]


def hausdorff(a: LabelMap, i: int, b: LabelMap, j: int) -> float:
    """Hausdorff distance in px of object `i` of `a` and object `j` of `b`, over all their pixels.

    That is not the distance of the two boundaries: of a disc and a ring around its edge, the
    disc's centre is the farthest pixel.
    """
    return max(_directed(a, i, b, j), _directed(b, j, a, i))


def _directed(a: LabelMap, i: int, b: LabelMap, j: int) -> float:
    """The largest distance in px of a pixel of object `i` of `a` from object `j` of `b`, exactly.

    Inside the box of j every pixel of i that is not in j is tried. Of those beyond a side of the
    box, the last of its row or column is farther from every pixel of j than the others: the
    outline is enough.
    """
    box, own = b.boxes[j], a.boxes[i]
    top, left = np.maximum(box[[0, 2]], own[[0, 2]])
    bottom, right = np.minimum(box[[1, 3]], own[[1, 3]]) + 1
    best = 0.0
    if top < bottom and left < right:
        crop = (slice(top, bottom), slice(left, right))
        inside = np.argwhere((a.labels[crop] == i) & (b.labels[crop] != j))
        if len(inside):
            best = float(b.distances(inside + np.array((top, left)), j).max())
    outline = a.outline(i)
    beyond = (outline < box[[0, 2]]).any(axis=1) | (outline > box[[1, 3]]).any(axis=1)
    if not beyond.any():
        return best
    return max(best, float(b.distances(_farthest(outline[beyond], b.outline(j)), j).max()))


def _farthest(points: Int, outline: Int) -> Int:
    """Those of some points that may be farthest from the object with the outline.

    A point's distance from the object is at most that from any one pixel of it, and less than
    that by no more than the object's diameter.
    """
    one = outline[0]
    diameter = float(np.hypot(*np.ptp(outline, axis=0)))
    distance = np.hypot(points[:, 0] - one[0], points[:, 1] - one[1])
    kept: Int = points[distance >= distance.max() - diameter - 1e-6]
    return kept
