"""Polygons that share borders, simplified together without holding all of them at work at once.

Simplifying removes vertices, so a polygon never leaves its bounds; polygons whose bounds lie apart
have nothing to do with one another and can be simplified one after the other, with the same
result. Knows no files, classes or units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage

Int = npt.NDArray[np.int64]
Polygons = npt.NDArray[np.object_]

CELL_PX = 64
"""Side of the squares in which bounds are looked at; those in one square count as one group."""
VERTICES = 1_000_000
"""Vertices that are simplified at a time, or those of one group where it has more."""


def simplify(polygons: Polygons, tolerance_px: float, *, vertices: int = VERTICES) -> Polygons:
    """`shapely.coverage_simplify` of a valid coverage, some groups of polygons at a time.

    Memory bound: what GEOS takes for `vertices`, a few hundred bytes each, or for the largest group
    of polygons whose bounds hang together.

    Args:
        polygons: (n,) polygons in pixels.
        tolerance_px: as of `shapely.coverage_simplify`.
        vertices: about so many at a time.
    """
    sizes = shapely.get_num_coordinates(polygons)
    if int(sizes.sum()) <= vertices:
        return np.asarray(shapely.coverage_simplify(polygons, tolerance_px), object)
    group = groups(shapely.bounds(polygons).T)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group, weights=sizes))
    batch = (np.maximum(ends - 1, 0) // vertices).astype(np.int64)[group[order]]
    result = np.empty(len(polygons), object)
    for part in np.split(order, np.flatnonzero(np.diff(batch)) + 1):
        result[part] = shapely.coverage_simplify(polygons[part], tolerance_px)
    return result


def groups(bounds: npt.NDArray[Any]) -> Int:
    """(n,) number of each polygon's group, from 0; bounds of different groups lie apart.

    Args:
        bounds: (4, n) left, top, right and bottom of the polygons in pixels.
    """
    if not bounds.shape[1]:
        return np.zeros(0, np.int64)
    left, top, right, bottom = (bounds // CELL_PX).astype(np.int64)
    x, y = left.min(), top.min()
    cover = np.zeros((bottom.max() - y + 2, right.max() - x + 2), np.int64)
    for rows, columns, sign in (
        (top, left, 1),
        (top, right + 1, -1),
        (bottom + 1, left, -1),
        (bottom + 1, right + 1, 1),
    ):
        np.add.at(cover, (rows - y, columns - x), sign)
    labels, _ = ndimage.label(cover.cumsum(0).cumsum(1) > 0)
    return np.asarray(labels[top - y, left - x] - 1, np.int64)
