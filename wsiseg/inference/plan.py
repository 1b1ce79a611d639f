"""Which windows cover the tissue, and which tiles they need. Knows no pixels and no networks.

Windows lie on one grid with stride window - overlap; the last column and row are flush with the
slide's edges (place = size - window). A slide smaller than a window has one window at 0, whose
rest is white. Two windows share a tile where both need it at the same place: everywhere, where
the stride is a multiple of the tile, and less or nowhere at other strides. Windows along an edge
that is no whole number of strides away have tiles of their own there.

Order of the visits: blocks of `BLOCK_COLUMNS` window columns from left to right, in each block
row by row. So what is live at a time (tiles that a later window needs, chunks that a later window
adds to) is a few rows of one block, and one column per block border, whatever the slide's height.
The order depends on nothing but the slide, the tissue and the overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.errors import ModelError, UsageError
from wsiseg.geometry import Box, Grid, Point
from wsiseg.inference.contracts import TissueLike

Ints = npt.NDArray[np.int64]
BLOCK_COLUMNS = 6
"""Windows along a row of a block. A row of so many shares tiles of the full-size network with the
next one in the memory of the default; with 16, more than a fifth of the tiles is encoded twice."""
_STEPS = 16
"""Steps from one window to the next that a window has at most."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Windows and tiles of one slide.

    Attributes:
        grid: the pixels at the model's resolution.
        window_px: side of a window.
        tile_px: side of a tile.
        overlap_px: pixels that neighbouring windows have in common.
        windows: (N, 2) places (x, y) of the windows, in the order of the visits.
        tiles: (M, 2) places (x, y) of the distinct tiles.
        window_tiles: (N, T) index into `tiles` of each window's tiles, row by row.
    """

    grid: Grid
    window_px: int
    tile_px: int
    overlap_px: int
    windows: Ints
    tiles: Ints
    window_tiles: Ints

    @property
    def tiles_without_sharing(self) -> int:
        """Tiles to encode if every window were computed by itself."""
        return int(self.window_tiles.size)

    def window_box(self, place: Point) -> Box:
        """The pixels of the window at `place` that lie in the grid."""
        return Box(*place, self.window_px, self.window_px).intersection(self.grid.box)

    def places(self, start: int, stop: int) -> list[Point]:
        """Places of the windows [start, stop)."""
        return [Point(int(x), int(y)) for x, y in self.windows[start:stop]]

    def tile_place(self, index: int) -> Point:
        """Place of a tile."""
        return Point(int(self.tiles[index, 0]), int(self.tiles[index, 1]))

    def window_chunks(self, place: Point, chunk_px: int) -> Iterator[tuple[int, int]]:
        """(row, column) of the chunks that the window at `place` touches."""
        return self.window_box(place).cells(chunk_px)

    def windows_per_chunk(self, chunk_px: int) -> dict[tuple[int, int], int]:
        """How many windows touch each chunk (row, column); chunks that none touches are absent."""
        counts: dict[tuple[int, int], int] = {}
        for place in self.places(0, len(self.windows)):
            for key in self.window_chunks(place, chunk_px):
                counts[key] = counts.get(key, 0) + 1
        return counts

    def live_chunks(self, chunk_px: int) -> int:
        """The most chunks that are begun and not finished at one time."""
        left = self.windows_per_chunk(chunk_px)
        live: set[tuple[int, int]] = set()
        most = 0
        for place in self.places(0, len(self.windows)):
            keys = list(self.window_chunks(place, chunk_px))
            live.update(keys)
            most = max(most, len(live))
            for key in keys:
                left[key] -= 1
                if not left[key]:
                    live.remove(key)
        return most


def plan(
    grid: Grid,
    tissue: TissueLike | None,
    *,
    window_px: int,
    tile_px: int,
    overlap_px: int = 256,
) -> Plan:
    """The windows that hold tissue, so that every tissue pixel is seen, and their tiles.

    Args:
        grid: the slide's pixels at the model's resolution.
        tissue: where to look; None takes every window.
        window_px: side of a window, a multiple of `tile_px`.
        tile_px: side of a tile.
        overlap_px: pixels that neighbouring windows have in common, 0 to 15/16 of them.

    Raises:
        UsageError: an overlap that cannot be.
        ModelError: a window that is not a whole number of tiles.
    """
    if tile_px < 1 or window_px < tile_px or window_px % tile_px:
        raise ModelError(f"the model's window of {window_px} px is no multiple of {tile_px} px")
    most = window_px - max(1, window_px // _STEPS)
    if not 0 <= overlap_px <= most:
        raise UsageError(f"overlap of {overlap_px} px: must be from 0 to {most} px for this model")
    stride = window_px - overlap_px
    columns = axis_places(grid.size.width, window_px, stride)
    rows = axis_places(grid.size.height, window_px, stride)
    kept = [
        (x, y)
        for first in range(0, len(columns), BLOCK_COLUMNS)
        for y in rows
        for x in columns[first : first + BLOCK_COLUMNS]
        if tissue is None or tissue.covers(_clipped(grid, x, y, window_px), grid)
    ]
    windows = np.array(kept, np.int64).reshape(-1, 2)
    tiles, window_tiles = _tiles(windows, window_px, tile_px)
    return Plan(grid, window_px, tile_px, overlap_px, windows, tiles, window_tiles)


def axis_places(size: int, window_px: int, stride: int) -> list[int]:
    """Places of windows along one axis: every `stride`, the last one flush with the end."""
    if size <= window_px:
        return [0]
    return [*range(0, size - window_px, stride), size - window_px]


def _clipped(grid: Grid, x: int, y: int, window_px: int) -> Box:
    return Box(x, y, window_px, window_px).intersection(grid.box)


def _tiles(windows: Ints, window_px: int, tile_px: int) -> tuple[Ints, Ints]:
    """Distinct tiles (M, 2) of windows (N, 2), and the index of each window's tiles (N, T)."""
    steps = np.arange(0, window_px, tile_px, dtype=np.int64)
    offsets = np.stack([np.tile(steps, len(steps)), np.repeat(steps, len(steps))], axis=1)
    places = windows[:, None, :] + offsets[None]
    width = int(places[..., 0].max(initial=0)) + 1
    keys, index = np.unique(places[..., 1] * width + places[..., 0], return_inverse=True)
    tiles = np.stack([keys % width, keys // width], axis=1)
    return tiles, index.reshape(places.shape[:2]).astype(np.int64)
