"""Regions of equal label as polygons along the pixel edges. Knows no files, classes or units.

A region is a 4-connected set of pixels of one value; where the canvas has objects, each is a region
of its own. Its polygon follows the edges of its pixels
exactly, keeps holes, and has a vertex at every corner and wherever three or more labels meet, so
that all polygons together are a valid coverage (neighbours share every vertex of their border).

Method: the canvas is read in bands. Runs of equal pixels in a row are joined to regions by
connected components, within a band and across the seams; `wsiseg.outputs.corners` lists the
places where a region's boundary turns or meets a third label; boundaries are followed once, at
the end, by joining each such place to the next along its row or column. Nothing is cut at a
seam, so the result does not depend on the height of the bands.

Memory bound: one band of labels and confidences with a few masks of its size, plus about 100
bytes for each vertex of the regions kept. Regions under the minimum area that lie inside one
band are dropped with their band.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.canvas import Canvas
from wsiseg.geometry import Box
from wsiseg.outputs.corners import Corners, find_corners
from wsiseg.outputs.rings import closed_rings, find_rings, next_corner, signed_areas
from wsiseg.regions import Labels, connected, find_runs, run_of

Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

BAND_PX = 512
"""Default height of a band; a row of chunks of the canvas."""


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


def trace(canvas: Canvas, *, band_px: int = BAND_PX, min_area_px: float = 0) -> Regions:
    """All regions of a canvas of value 1 or more, the same for any height of the bands.

    Args:
        canvas: labels and confidences.
        band_px: rows read at a time.
        min_area_px: smaller regions are dropped and smaller holes filled. Whatever lies in a
            filled hole is smaller than the hole and so dropped as well: nothing overlaps.
    """
    bands = _Bands(canvas, min_area_px)
    for y in range(0, canvas.grid.size.height, band_px):
        bands.add(y, band_px)
    return _assemble(bands)


class _Stats(NamedTuple):
    """Sums over components: label, pixels, confidences."""

    value: Int
    area: Int
    confidence: Int


class _Bands:
    """Bands of a canvas, top to bottom: corners and component sums, joined across the seams.

    Components are numbered through all bands; `final` numbers of regions are known at the end.
    """

    def __init__(self, canvas: Canvas, min_area_px: float) -> None:
        self.canvas = canvas
        self.min_area_px = min_area_px
        self.count = 0
        self.corners: list[Corners] = []
        self.owners: list[Int32] = []  # component of each corner
        self.stats: list[_Stats] = []
        self.seams: list[Int] = []  # (2, n) pairs of components that are one region
        width = canvas.grid.size.width
        self.above: Labels = np.zeros((1, width), np.uint8)  # last row of the band before
        self.above_ids: Int32 = np.full(width, -1, np.int32)  # its components

    def add(self, top: int, band_px: int) -> None:
        """Take the band of rows that starts at `top`; bands come in order."""
        width, height = self.canvas.grid.size
        box = Box(0, top, width, min(band_px, height - top))
        colours = self.canvas.colours(box)
        starts, ids = find_runs(colours)
        values = colours.ravel()[starts]
        if self.canvas.has_objects:
            values = self.canvas.labels(box).ravel()[starts]
        self.stats.append(_sums(values, self.canvas.confidence(box), starts, ids))
        first = ids[run_of(starts, np.arange(width))]
        last = ids[run_of(starts, np.arange(colours.size - width, colours.size))]
        self._add_corners(colours, top, starts, ids, (first, last))
        if top:
            same = (self.above[0] == colours[0]) & (colours[0] != 0)
            pairs = np.stack([self.above_ids[same], first[same] + self.count])
            self.seams.append(np.unique(pairs, axis=1))
        self.above, self.above_ids = colours[-1:], last + np.int32(self.count)
        self.count += len(self.stats[-1].value)

    def _add_corners(
        self, colours: Labels, top: int, starts: Int, ids: Int32, edges: tuple[Int32, Int32]
    ) -> None:
        """Corners on the line over each row of the band, and under the last row of all."""
        width, height = self.canvas.grid.size
        rows = [self.above.astype(colours.dtype), colours]
        if top + len(colours) == height:
            rows.append(np.zeros((1, width), colours.dtype))
        corners, pixels = find_corners(np.concatenate(rows), top)
        inside = pixels >= width  # the first row is that of the band before
        owner = np.empty(len(corners), np.int32)
        owner[~inside] = self.above_ids[pixels[~inside]]
        component = ids[run_of(starts, pixels[inside] - width)]
        owner[inside] = component + np.int32(self.count)
        # Small components away from both edges of the band cannot grow: forget their corners.
        small = self.stats[-1].area < self.min_area_px
        for edge in edges:
            small[edge] = False
        keep = ~inside
        keep[inside] = ~small[component]
        self.corners.append(corners.take(keep))
        self.owners.append(owner[keep])

    def finish(self) -> tuple[Corners, Int32, _Stats]:
        """Corners of the regions that are large enough, the region of each, and all sums."""
        pairs = np.concatenate(self.seams, axis=1) if self.seams else np.zeros((2, 0), np.int64)
        final = connected(pairs[0], pairs[1], self.count)
        n = int(final.max()) + 1
        value = np.zeros(n, np.int64)
        value[final] = np.concatenate([s.value for s in self.stats])
        area = np.bincount(final, np.concatenate([s.area for s in self.stats]), n)
        confidence = np.bincount(final, np.concatenate([s.confidence for s in self.stats]), n)
        for i, corners in enumerate(self.corners):
            owner = final[self.owners[i]]
            keep = area[owner] >= self.min_area_px
            self.corners[i] = corners.take(keep)
            self.owners[i] = owner[keep]
        merged, owners = Corners.concatenate(self.corners), np.concatenate(self.owners)
        self.corners.clear()
        self.owners.clear()
        return merged, owners, _Stats(value, area.astype(np.int64), confidence.astype(np.int64))


def _sums(values: Labels, confidence: UInt8, starts: Int, ids: Int32) -> _Stats:
    """Label, pixels and summed confidence of each component of a band, given labels of runs."""
    n = int(ids.max()) + 1
    value = np.zeros(n, np.int64)
    value[ids] = values
    area = np.bincount(ids, np.diff(starts, append=confidence.size), n)
    runs = np.add.reduceat(confidence.ravel(), starts, dtype=np.int64)
    return _Stats(value, area.astype(np.int64), np.bincount(ids, runs, n).astype(np.int64))


def _assemble(bands: _Bands) -> Regions:
    """Corners joined to rings, rings to polygons."""
    corners, owners, stats = bands.finish()
    order, offsets = find_rings(next_corner(corners, owners))
    ring_owner = owners[order[offsets[:-1]]]
    x, y = corners.x[order], corners.y[order]
    del corners, owners, order
    ring_area = signed_areas(x, y, offsets)
    keep = (ring_area > 0) | (-ring_area >= max(bands.min_area_px, 1))
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
    small = (stats.value > 0) & (stats.area < bands.min_area_px)
    return Regions(
        values=stats.value[owner].astype(np.uint8),
        polygons=np.asarray(polygons, object),
        areas_px=stats.area[owner],
        confidences=stats.confidence[owner] / (255.0 * stats.area[owner]),
        dropped=np.bincount(stats.value[small], minlength=256),
    )
