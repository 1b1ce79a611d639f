"""Regions of equal label as polygons along the pixel edges. Knows no files, classes or units.

A region is a 4-connected set of pixels of one value; where the canvas has objects, each is a region
of its own. Its polygon follows the edges of its pixels
exactly, keeps holes, and has a vertex at every corner and wherever three or more labels meet, so
that all polygons together are a valid coverage (neighbours share every vertex of their border).

Where a tolerance is given, polygons that hang together are simplified together as soon as they are
made, one group after the other.

`wsiseg.outputs.tracer` says how boundaries are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.canvas import Canvas
from wsiseg.outputs.corners import Corners
from wsiseg.outputs.coverage import groups, simplify
from wsiseg.outputs.rings import closed_rings, find_rings, next_corner, signed_areas
from wsiseg.outputs.tracer import BAND_PX, STRIP_PX, Part, Tracer

Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Shapes = tuple[npt.NDArray[np.object_], Int32]
"""Polygons, and the region of each."""
BATCH_CORNERS = 1 << 20
"""Corners that are joined to rings at a time, each of which takes about 100 bytes meanwhile."""
NOWHERE = np.iinfo(np.int64).max


class Region(NamedTuple):
    """One 4-connected region.

    Attributes:
        value: label on disk, 1..C.
        polygon: its shape in grid pixels.
        area_px: its pixels, without those in filled holes.
        confidence: mean probability of its pixels, 0..1.
    """

    value: int
    polygon: shapely.Polygon
    area_px: int
    confidence: float


@dataclass(frozen=True)
class Regions:
    """All regions of a canvas, by the place of their first corner (top to bottom).

    Attributes:
        values: (n,) uint8 labels on disk.
        polygons: (n,) object array of shapely Polygons in grid pixels.
        areas_px: (n,) int64 pixels.
        confidences: (n,) float64 mean probabilities, 0..1.
        dropped: regions under the minimum area for each value, (256,) int64.
        tolerance_px: to which the polygons are simplified; 0 where they follow the pixel edges.
    """

    values: UInt8
    polygons: npt.NDArray[np.object_]
    areas_px: Int
    confidences: npt.NDArray[np.float64]
    dropped: Int
    tolerance_px: float = 0

    def __len__(self) -> int:
        return len(self.values)


def trace_regions(
    canvas: Canvas, *, band_px: int = BAND_PX, min_area_px: float = 0
) -> Iterator[Region]:
    """The regions of a canvas one by one; see `trace`."""
    regions = trace(canvas, band_px=band_px, min_area_px=min_area_px)
    for i in range(len(regions)):
        yield Region(
            int(regions.values[i]),
            regions.polygons[i],
            int(regions.areas_px[i]),
            float(regions.confidences[i]),
        )


def trace(
    canvas: Canvas,
    *,
    band_px: int = BAND_PX,
    strip_px: int = STRIP_PX,
    min_area_px: float = 0,
    tolerance_px: float = 0,
) -> Regions:
    """All regions of a canvas of value 1 or more, the same for any size of the pieces.

    Args:
        canvas: labels and confidences.
        band_px: rows read at a time.
        strip_px: columns read at a time.
        min_area_px: smaller regions are dropped and smaller holes filled. Whatever lies in a
            filled hole is smaller than the hole and so dropped as well: nothing overlaps.
        tolerance_px: as of `wsiseg.outputs.coverage.simplify`; 0 keeps the pixel edges.
    """
    tracer = Tracer(canvas, band_px=band_px, strip_px=strip_px, min_area_px=min_area_px)
    for piece in tracer.pieces():
        tracer.add(piece)
    return assemble(tracer, tolerance_px=tolerance_px)


def assemble(tracer: Tracer, *, tolerance_px: float = 0) -> Regions:
    """The regions of a canvas of which a tracer was given every piece.

    Corners are joined to rings, rings to polygons, some regions at a time, and polygons simplified
    as soon as all that hang together are there.

    Memory bound: 9 bytes a corner, about 100 more for those that are joined at a time, about 100 a
    vertex for the polygons that are simplified at a time (`wsiseg.outputs.coverage`), and the
    polygons that come out; without a tolerance those are exact and of 16 bytes a vertex.
    """
    parts, stats = tracer.finish()
    extents = find_extents(parts, len(stats.area))
    group = groups(extents.bounds) if tolerance_px else np.zeros(len(stats.area), np.int64)
    in_turn = np.lexsort((extents.first, group))
    join = partial(_polygons, min_hole_px=max(tracer.min_area_px, 1))
    shapes: Iterator[Shapes] = starmap(join, by_region(parts, extents.corners, in_turn))
    if tolerance_px:
        whole = by_group(shapes, group)
        shapes = ((simplify(found, tolerance_px), owner) for found, owner in whole)
    polygons, owner = _joined(list(shapes))
    order = np.argsort(extents.first[owner], kind="stable")
    owner = owner[order]
    small = (stats.value > 0) & (stats.area < tracer.min_area_px)
    return Regions(
        values=stats.value[owner].astype(np.uint8),
        polygons=polygons[order],
        areas_px=stats.area[owner],
        confidences=stats.confidence[owner] / (255.0 * stats.area[owner]),
        dropped=np.bincount(stats.value[small], minlength=256),
        tolerance_px=tolerance_px,
    )


class Extents(NamedTuple):
    """Where regions lie, by their corners.

    Attributes:
        first: (n,) place of the first corner in reading order; NOWHERE without corners.
        corners: (n,) how many there are.
        bounds: (4, n) smallest x and y and largest x and y; zeros without corners.
    """

    first: Int
    corners: Int
    bounds: Int


def find_extents(parts: list[Part], regions: int) -> Extents:
    """The extents of regions 0 .. `regions` - 1 from corners with their regions."""
    first, count = np.full(regions, NOWHERE), np.zeros(regions, np.int64)
    low, high = np.full((2, regions), NOWHERE), np.zeros((2, regions), np.int64)
    for packed, owner in parts:
        corners, order = packed.corners(), np.argsort(owner, kind="stable")
        starts = np.flatnonzero(np.diff(owner[order], prepend=-1))
        place = order[starts]
        found = owner[place]
        key = (corners.y[place].astype(np.int64) << 32) + corners.x[place]
        first[found] = np.minimum(first[found], key)
        count[found] += np.diff(starts, append=len(order))
        for axis, values in enumerate((corners.x[order], corners.y[order])):
            low[axis, found] = np.minimum(low[axis, found], np.minimum.reduceat(values, starts))
            high[axis, found] = np.maximum(high[axis, found], np.maximum.reduceat(values, starts))
    low[:, count == 0] = 0
    return Extents(first, count, np.concatenate([low, high]))


def by_region(
    parts: list[Part], count: Int, in_turn: Int, *, batch_corners: int = BATCH_CORNERS
) -> Iterator[tuple[Corners, Int32]]:
    """The corners of some regions at a time, in reading order, and the region of each.

    Args:
        parts: corners with their regions; emptied on the way.
        count: (n,) how many corners each region has.
        in_turn: (n,) the regions in the order in which they come.
        batch_corners: about so many at a time; a region is never divided.
    """
    batch = np.empty_like(count)
    batch[in_turn] = np.maximum(np.cumsum(count[in_turn]) - 1, 0) // batch_corners
    spans = [_span(batch[owner]) for _, owner in parts]
    for number in np.unique(batch[count > 0]).tolist():
        yield _batch(parts, spans, batch, number)


def _batch(parts: list[Part], spans: list[range], batch: Int, number: int) -> tuple[Corners, Int32]:
    """The corners of the regions of a batch, taken out of parts that hold those up to it."""
    taken = []
    for i, (packed, owner) in enumerate(parts):
        if number not in spans[i]:
            continue
        own = np.flatnonzero(batch[owner] == number)
        taken.append((packed.take(own).corners(), owner[own]))
        if spans[i][-1] == number:
            parts[i] = packed.take(own[:0]), owner[own[:0]]
    corners = Corners.concatenate([c for c, _ in taken])
    order = np.lexsort((corners.x, corners.y))
    return corners.take(order), np.concatenate([o for _, o in taken])[order]


def by_group(shapes: Iterable[Shapes], group: Int) -> Iterator[Shapes]:
    """Polygons with their regions in batches that divide no group.

    Args:
        shapes: polygons and the region of each; groups come one after the other.
        group: (n,) number of the group of each region, in their order.
    """
    waiting: list[Shapes] = []
    latest = -1
    for found, owner in shapes:
        number = group[owner]
        last = int(number.max())
        ended = number < last
        if last > latest and (waiting or ended.any()):
            yield _joined([*waiting, (found[ended], owner[ended])])
            waiting = []
        waiting.append((found[~ended], owner[~ended]))
        latest = last
    if waiting:
        yield _joined(waiting)


def _joined(shapes: Sequence[Shapes]) -> Shapes:
    """All of them as one."""
    polygons = [np.zeros(0, object), *(found for found, _ in shapes)]
    owners = [np.zeros(0, np.int32), *(owner for _, owner in shapes)]
    return np.concatenate(polygons), np.concatenate(owners)


def _span(numbers: Int) -> range:
    """From the smallest to the largest of some numbers."""
    return range(numbers.min(), numbers.max() + 1) if len(numbers) else range(0)


def _polygons(
    corners: Corners, owners: Int32, min_hole_px: float
) -> tuple[npt.NDArray[np.object_], Int32]:
    """The polygons of whole regions, by their first corners, and the region of each."""
    order, offsets = find_rings(next_corner(corners, owners))
    ring_owner = owners[order[offsets[:-1]]]
    x, y = corners.x[order], corners.y[order]
    ring_area = signed_areas(x, y, offsets)
    keep = (ring_area > 0) | (-ring_area >= min_hole_px)
    # Rings by region in the order of their shells, the shell first, then holes from the top.
    shells = np.flatnonzero(ring_area > 0)
    known, ring_region = np.unique(ring_owner, return_inverse=True)
    rank = np.zeros(len(known), np.int64)
    rank[ring_region[shells]] = np.arange(len(shells))
    chosen = np.flatnonzero(keep)
    chosen = chosen[np.lexsort((chosen, ring_area[chosen] < 0, rank[ring_region[chosen]]))]
    coords, ring_offsets = closed_rings(x, y, offsets, chosen)
    per_region = np.bincount(rank[ring_region[chosen]], minlength=len(shells))
    polygon_offsets = np.concatenate([[0], np.cumsum(per_region)])
    polygons = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, coords, (ring_offsets, polygon_offsets)
    )
    return np.asarray(polygons, object), ring_owner[shells]
