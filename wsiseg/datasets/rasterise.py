"""Polygons as pixels by the even-odd rule at pixel centres. Knows no files, classes or slides.

A pixel belongs to a polygon where its centre does; a centre on a left or upper border is inside,
on a right or lower border outside. So polygons that share a border share no pixel and leave none
between them, a polygon along pixel edges gives back exactly its pixels, and a border that crosses
itself is no error: the part that it encloses twice is outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box

F64 = npt.NDArray[np.float64]
_FAR = 2.0**40


def edges_of(rings: Sequence[F64]) -> F64:
    """The borders of one polygon as edges that run down.

    Args:
        rings: shell and holes, each (n, 2) of x, y; closed or not.

    Returns:
        (m, 4) x0, y0, x1, y1 with y0 < y1; edges along a row are left out, they cross none.
    """
    parts = [np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in rings]
    edges = np.concatenate(parts)
    up = edges[:, 1] > edges[:, 3]
    edges[up] = edges[up][:, [2, 3, 0, 1]]
    return edges[edges[:, 1] < edges[:, 3]]


def has_area(ring: F64) -> bool:
    """Whether the points of a ring, (n, 2) of x, y, do not all lie on one line.

    A ring that crosses itself has area, though what it goes round both ways may add up to 0.
    """
    scaled = ring / max(1.0, float(np.abs(ring).max()))  # its squares are finite
    offsets = scaled - scaled[0]
    far = offsets[np.argmax(np.abs(offsets).sum(axis=1))]
    across = offsets[:, 0] * far[1] - offsets[:, 1] * far[0]
    return bool(np.abs(across).max() > 1e-9 * np.dot(far, far))


def fill(edges: F64, box: Box) -> npt.NDArray[np.bool_]:
    """(box.height, box.width) whether each pixel of a box lies in a polygon.

    Args:
        edges: of one polygon, as `edges_of` gives them, in pixels of the box's grid.
        box: the pixels wanted.
    """
    toggles = np.zeros((box.height, box.width + 1), bool)
    x0, y0, x1, y1 = edges.T
    # An edge crosses the rows whose centres lie in [y0, y1).
    first = _first_centre(y0, box.y, box.height)
    last = _first_centre(y1, box.y, box.height)
    count = last - first
    index = np.repeat(np.arange(len(edges)), count)
    start = np.concatenate([[0], np.cumsum(count)])[:-1]
    rows = np.arange(len(index)) - start[index] + first[index]
    slope = (x1 - x0) / (y1 - y0)
    x = x0[index] + (rows + box.y + 0.5 - y0[index]) * slope[index]
    columns = _first_centre(x, box.x, box.width)
    np.logical_xor.at(toggles, (rows, columns), True)
    inside: npt.NDArray[np.bool_] = np.logical_xor.accumulate(toggles, axis=1)[:, :-1]
    return inside


def _first_centre(values: F64, origin: int, limit: int) -> npt.NDArray[np.int64]:
    """First of `limit` pixels from `origin` whose centre is not before each value."""
    pixels = np.ceil(np.clip(values, -_FAR, _FAR) - 0.5) - origin
    return np.asarray(np.clip(pixels, 0, limit), np.int64)
