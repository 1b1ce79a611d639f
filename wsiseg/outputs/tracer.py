"""The corners of all regions of a canvas, which is read in pieces. Knows no polygons.

Method: the canvas is read in pieces: strips from the left, in each bands from the top, which is
about the order in which inference finishes them. Runs of equal pixels in a row are joined to
regions by connected components, within a piece and across the seams; `wsiseg.outputs.corners` lists
the places where a region's boundary turns or meets a third label; boundaries are followed at the
end, some regions at a time, by joining each such place to the next along its row or column. Nothing
is cut at a seam, so the result does not depend on the size of the pieces.

Memory bound: one piece of labels and confidences with a few masks of its size, plus 9 bytes for
each vertex of the regions kept. Regions under the minimum area that lie inside one
piece are dropped with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.canvas import Canvas
from wsiseg.geometry import Box
from wsiseg.outputs.corners import Packed, find_corners
from wsiseg.regions import Labels, connected, find_runs, run_of

Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Part = tuple[Packed, Int32]
"""Corners in reading order, and the region of each."""

BAND_PX, STRIP_PX = 512, 4096
"""Default height and width of a piece: rows and columns of chunks of the canvas."""


class Sums(NamedTuple):
    """Sums over components: label, pixels, confidences."""

    value: Int
    area: Int
    confidence: Int


class _Line(NamedTuple):
    """The pixels along an edge of a piece: their colours, and their components."""

    colours: Labels
    ids: Int32

    @classmethod
    def nothing(cls, length: int) -> _Line:
        """No region anywhere."""
        return cls(np.zeros(length, np.uint8), np.full(length, -1, np.int32))

    def part(self, start: int, stop: int) -> _Line:
        """The pixels [start, stop)."""
        return _Line(self.colours[start:stop], self.ids[start:stop])


class Tracer:
    """Takes the pieces of a canvas one by one.

    Components are numbered through all pieces; which of them are one region is known at the end.

    Attributes:
        min_area_px: regions under it are dropped.
    """

    def __init__(
        self,
        canvas: Canvas,
        *,
        band_px: int = BAND_PX,
        strip_px: int = STRIP_PX,
        min_area_px: float = 0,
    ) -> None:
        """A tracer of the canvas, of which nothing is read yet; see `trace`."""
        self._canvas, self.min_area_px = canvas, min_area_px
        self._band_px, self._strip_px = band_px, strip_px
        self._count = 0
        self._corners: deque[Packed] = deque()
        self._owners: deque[Int32] = deque()  # component of each corner
        self._stats: list[Sums] = []
        self._seams: list[Int] = []  # (2, n) pairs of components that are one region
        self._above = _Line.nothing(0)  # last row of the piece before in the strip
        self._left = _Line.nothing(0)  # last column of the strip before, as high as the canvas
        self._right: list[_Line] = []  # last columns of the pieces of this strip

    def pieces(self) -> Iterator[Box]:
        """What is to be added, in this order: strips from the left, in each bands from the top."""
        width, height = self._canvas.grid.size
        for x in range(0, width, self._strip_px):
            for y in range(0, height, self._band_px):
                box = Box(x, y, self._strip_px, self._band_px)
                yield box.intersection(self._canvas.grid.box)

    def add(self, box: Box) -> None:
        """Take the next piece; its labels and confidences must be final."""
        if box.y == 0:
            self._begin_strip(box)
        colours = self._canvas.colours(box)
        starts, ids = find_runs(colours)
        values = colours.ravel()[starts]
        if self._canvas.has_objects:
            values = self._canvas.labels(box).ravel()[starts]
        stats = _sums(values, self._canvas.confidence(box), starts, ids)
        rows, columns = np.arange(box.height) * box.width, np.arange(box.width)
        top, bottom = (ids[run_of(starts, columns + start)] for start in (0, rows[-1]))
        first, last = (ids[run_of(starts, rows + start)] for start in (0, box.width - 1))
        # Small components away from all edges of the piece cannot grow: forget their corners.
        small = stats.area < self.min_area_px
        for edge in (top, bottom, first, last):
            small[edge] = False
        self._add_corners(box, colours, starts, ids, small)
        self._join(self._above, _Line(colours[0], top + np.int32(self._count)))
        left = self._left.part(box.y, box.bottom)
        self._join(left, _Line(colours[:, 0], first + np.int32(self._count)))
        self._above = _Line(colours[-1], bottom + np.int32(self._count))
        self._right.append(_Line(colours[:, -1].copy(), last + np.int32(self._count)))
        self._stats.append(stats)
        self._count += len(stats.value)

    def _begin_strip(self, box: Box) -> None:
        self._above = _Line.nothing(box.width)
        self._left = _Line.nothing(self._canvas.grid.size.height)
        if self._right:
            self._left = _Line(*(np.concatenate(parts) for parts in zip(*self._right, strict=True)))
        self._right = []

    def _join(self, before: _Line, after: _Line) -> None:
        """Remember which components meet along the edge of a piece."""
        same = (before.colours == after.colours) & (after.colours != 0)
        if same.any():
            pairs = np.stack([before.ids[same], after.ids[same]])
            self._seams.append(np.unique(pairs, axis=1))

    def _add_corners(self, box: Box, colours: Labels, starts: Int, ids: Int32, small: Bool) -> None:
        """Corners on the lines over each row and left of each column of a piece, and on the lower
        and right edge of the canvas; to find them, the pixels before these lines are looked at."""
        width, height = self._canvas.grid.size
        more = int(box.x > 0)  # a column of the strip before
        below = int(box.bottom == height)
        around = np.zeros((1 + box.height + below, more + box.width), colours.dtype)
        inside = slice(1, 1 + box.height), slice(more, None)
        around[inside] = colours
        around[0, more:] = self._above.colours
        if more:
            begin = max(0, box.y - 1)
            around[begin - box.y + 1 : 1 + box.height, 0] = self._left.colours[begin : box.bottom]
        corners, pixels = find_corners(around, box.y)
        right = corners.x < around.shape[1] if box.right < width else True
        own = np.flatnonzero((corners.x >= more) & right)
        corners, (row, column) = corners.take(own), np.divmod(pixels[own], around.shape[1])
        corners.x[:] += np.int32(box.x - more)
        owner = np.empty(len(corners), np.int32)
        before = column < more
        owner[before] = self._left.ids[row[before] + box.y - 1]
        over = ~before & (row == 0)
        owner[over] = self._above.ids[column[over] - more]
        here = ~before & (row > 0)
        component = ids[run_of(starts, (row[here] - 1) * box.width + column[here] - more)]
        owner[here] = component + np.int32(self._count)
        keep = ~here
        keep[here] = ~small[component]
        self._corners.append(Packed.of(corners.take(keep)))
        self._owners.append(owner[keep])

    def finish(self) -> tuple[list[Part], Sums]:
        """Corners of the regions that are large enough, piece by piece, with the region of each,
        and the sums of all regions; every piece has been added."""
        pairs = np.concatenate(self._seams, axis=1) if self._seams else np.zeros((2, 0), np.int64)
        final = connected(pairs[0], pairs[1], self._count)
        n = int(final.max()) + 1
        value = np.zeros(n, np.int64)
        value[final] = np.concatenate([s.value for s in self._stats])
        area = np.bincount(final, np.concatenate([s.area for s in self._stats]), n)
        confidence = np.bincount(final, np.concatenate([s.confidence for s in self._stats]), n)
        parts = []
        while self._corners:  # each is dropped with the next
            corners, owner = self._corners.popleft(), final[self._owners.popleft()]
            keep = area[owner] >= self.min_area_px
            parts.append((corners.take(keep), owner[keep]))
        return parts, Sums(value, area.astype(np.int64), confidence.astype(np.int64))


def _sums(values: Labels, confidence: UInt8, starts: Int, ids: Int32) -> Sums:
    """Label, pixels and summed confidence of each component of a band, given labels of runs."""
    n = int(ids.max()) + 1
    value = np.zeros(n, np.int64)
    value[ids] = values
    area = np.bincount(ids, np.diff(starts, append=confidence.size), n)
    runs = np.add.reduceat(confidence.ravel(), starts, dtype=np.int64)
    return Sums(value, area.astype(np.int64), np.bincount(ids, runs, n).astype(np.int64))
