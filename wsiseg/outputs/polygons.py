"""Regions of equal label as polygons along the pixel edges. Knows no files, classes or units.

A region is a 4-connected set of pixels of one value; where the canvas has objects, each is a region
of its own. Its polygon follows the edges of its pixels
exactly, keeps holes, and has a vertex at every corner and wherever three or more labels meet, so
that all polygons together are a valid coverage (neighbours share every vertex of their border).

`wsiseg.outputs.tracer` says how, and what memory it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.canvas import Canvas
from wsiseg.outputs.rings import closed_rings, find_rings, next_corner, signed_areas
from wsiseg.outputs.tracer import BAND_PX, STRIP_PX, Tracer

Int = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]


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
    """

    values: UInt8
    polygons: npt.NDArray[np.object_]
    areas_px: Int
    confidences: npt.NDArray[np.float64]
    dropped: Int

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
) -> Regions:
    """All regions of a canvas of value 1 or more, the same for any size of the pieces.

    Args:
        canvas: labels and confidences.
        band_px: rows read at a time.
        strip_px: columns read at a time.
        min_area_px: smaller regions are dropped and smaller holes filled. Whatever lies in a
            filled hole is smaller than the hole and so dropped as well: nothing overlaps.
    """
    tracer = Tracer(canvas, band_px=band_px, strip_px=strip_px, min_area_px=min_area_px)
    for piece in tracer.pieces():
        tracer.add(piece)
    return assemble(tracer)


def assemble(tracer: Tracer) -> Regions:
    """The regions of a canvas of which a tracer was given every piece.

    Corners are joined to rings, rings to polygons.
    """
    corners, owners, stats = tracer.finish()
    order, offsets = find_rings(next_corner(corners, owners))
    ring_owner = owners[order[offsets[:-1]]]
    x, y = corners.x[order], corners.y[order]
    del corners, owners, order
    ring_area = signed_areas(x, y, offsets)
    keep = (ring_area > 0) | (-ring_area >= max(tracer.min_area_px, 1))
    # Rings by region in the order of their shells, the shell first, then holes from the top.
    shells = np.flatnonzero(ring_area > 0)
    rank = np.zeros(len(stats.area), np.int64)
    rank[ring_owner[shells]] = np.arange(len(shells))
    chosen = np.flatnonzero(keep)
    chosen = chosen[np.lexsort((chosen, ring_area[chosen] < 0, rank[ring_owner[chosen]]))]
    coords, ring_offsets = closed_rings(x, y, offsets, chosen)
    per_region = np.bincount(rank[ring_owner[chosen]], minlength=len(shells))
    polygon_offsets = np.concatenate([[0], np.cumsum(per_region)])
    polygons = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, coords, (ring_offsets, polygon_offsets)
    )
    owner = ring_owner[shells]
    small = (stats.value > 0) & (stats.area < tracer.min_area_px)
    return Regions(
        values=stats.value[owner].astype(np.uint8),
        polygons=np.asarray(polygons, object),
        areas_px=stats.area[owner],
        confidences=stats.confidence[owner] / (255.0 * stats.area[owner]),
        dropped=np.bincount(stats.value[small], minlength=256),
    )
