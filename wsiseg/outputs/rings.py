"""Corners of regions joined to closed rings. Knows no labels and no polygons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

from wsiseg.outputs.corners import EAST, NORTH, SOUTH, WEST, Corners

Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


def next_corner(corners: Corners, owner: Int32) -> Int32:
    """For each corner the one that follows along the boundary, region on the right-hand side.

    Along one side of a row or column the stretches of boundary do not overlap, so the k-th
    corner that leaves in a direction is followed by the k-th that is entered in it.
    """
    following = np.empty(len(corners), np.int32)
    for direction in (EAST, WEST):  # corners are in reading order
        following[corners.leave == direction] = np.flatnonzero(corners.enter == direction)
    by_column = np.lexsort((corners.y, corners.x)).astype(np.int32)
    leave, enter = corners.leave[by_column], corners.enter[by_column]
    for direction in (SOUTH, NORTH):
        following[by_column[leave == direction]] = by_column[enter == direction]
    _separate_pinches(corners, owner, following)
    return following


def _separate_pinches(corners: Corners, owner: Int32, following: Int32) -> None:
    """Where two pixels of one region touch only by a corner, turn around the others instead.

    A boundary that turned around the region's own pixels there would touch itself, which is no
    valid polygon; turning around the pixels between them gives separate rings that touch.
    """
    pinch = np.flatnonzero(corners.pinch)
    for step in (1, 2, 3):  # at most four at one point, next to one another
        a, b = pinch[:-step], pinch[step:]
        same = (corners.x[a] == corners.x[b]) & (corners.y[a] == corners.y[b])
        same &= owner[a] == owner[b]
        a, b = a[same], b[same]
        following[a], following[b] = following[b], following[a]


def find_rings(following: Int32) -> tuple[Int32, Int]:
    """The cycles of a permutation: (members in order, offsets of the cycles).

    A cycle starts at its smallest member, and cycles are in the order of those.
    """
    n = len(following)
    if not n:
        return following, np.zeros(1, np.int64)
    ones = np.ones(n)
    graph = csr_matrix((ones, following, np.arange(n + 1, dtype=np.int32)), shape=(n, n))
    count, cycle = connected_components(graph, connection="strong")
    first = np.empty(count, np.int32)
    first[cycle[::-1]] = np.arange(n - 1, -1, -1, dtype=np.int32)  # the smallest is written last
    rank = np.empty(count, np.int32)
    rank[np.argsort(first)] = np.arange(count, dtype=np.int32)
    ring = rank[cycle]
    first.sort()
    # Cut before each first member and let a further node lead to all of those: breadth first,
    # the members of a ring come out in their order.
    inner = np.ones(n, bool)
    inner[first] = False
    inner = inner[following]
    starts = np.zeros(n + 2, np.int32)
    np.cumsum(inner, out=starts[1:-1])
    starts[-1] = starts[-2] + count
    tree = csr_matrix((ones, np.concatenate([following[inner], first]), starts), shape=(n + 1,) * 2)
    reached = breadth_first_order(tree, n, return_predecessors=False)[1:]
    order = reached[np.argsort(ring[reached], kind="stable")]
    return order, np.concatenate([[0], np.cumsum(np.bincount(ring))])


def signed_areas(x: Int32, y: Int32, offsets: Int) -> Int:
    """Area of each ring in pixels; positive for shells, negative for holes."""
    if not len(x):
        return np.zeros(0, np.int64)
    rise = np.empty_like(y)
    np.subtract(y[1:], y[:-1], out=rise[:-1])
    rise[offsets[1:] - 1] = y[offsets[:-1]] - y[offsets[1:] - 1]
    return np.asarray(np.add.reduceat(np.multiply(x, rise, dtype=np.int64), offsets[:-1]))


def closed_rings(
    x: Int32, y: Int32, offsets: Int, chosen: Int
) -> tuple[npt.NDArray[np.float64], Int]:
    """Coordinates (n, 2) of the chosen rings, each closed, and their offsets."""
    sizes = np.diff(offsets)[chosen] + 1
    closed = np.concatenate([[0], np.cumsum(sizes)])
    take = np.repeat(offsets[:-1][chosen] - closed[:-1], sizes)
    take += np.arange(closed[-1])
    take[closed[1:] - 1] = offsets[:-1][chosen]  # the last point of a ring is its first
    coordinates = np.empty((len(take), 2))
    coordinates[:, 0] = x[take]
    coordinates[:, 1] = y[take]
    return coordinates, closed
