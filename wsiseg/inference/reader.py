"""Tiles of a slide in a given order, read ahead by threads, stain-normalised. Knows no networks.

Memory bound: at most `ahead` tiles are read or being read and not yet handed over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from types import TracebackType

import numpy as np
import numpy.typing as npt

from wsiseg.errors import SlideReadError, WsisegError
from wsiseg.geometry import Box, Grid, Point
from wsiseg.inference.contracts import SlideLike
from wsiseg.stain import apply_matrix

UInt8 = npt.NDArray[np.uint8]


class TileReader(AbstractContextManager["TileReader"]):
    """Reads tiles in order; leaving the `with` block ends the threads, whatever happened."""

    def __init__(
        self,
        slide: SlideLike,
        grid: Grid,
        *,
        tile_px: int,
        workers: int,
        ahead: int,
        stain_matrix: npt.ArrayLike | None = None,
    ) -> None:
        """Reads `tile_px` squares of `grid` with `workers` threads, at most `ahead` in advance.

        The optical densities of the tiles are mapped by `stain_matrix` (3, 3) where it is given.
        """
        self._slide, self._grid, self._tile_px = slide, grid, tile_px
        self._matrix = None if stain_matrix is None else np.asarray(stain_matrix, np.float64)
        self._ahead = max(1, ahead)
        self._pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="tiles")

    def tiles(self, places: Iterable[Point]) -> Iterator[UInt8]:
        """(tile_px, tile_px, 3) uint8 RGB tiles at `places`, in that order, white outside.

        Raises:
            SlideReadError: pixels that cannot be read, whatever a library raises for them; raised
                when that tile's turn comes.
        """
        rest = iter(places)
        waiting: deque[Future[UInt8]] = deque(
            self._pool.submit(self._read, place) for place in islice(rest, self._ahead)
        )
        while waiting:
            tile = waiting.popleft().result()
            for place in islice(rest, 1):
                waiting.append(self._pool.submit(self._read, place))
            yield tile

    def _read(self, place: Point) -> UInt8:
        side = self._tile_px
        try:
            tile = self._slide.read(Box(*place, side, side), self._grid)
        except (WsisegError, MemoryError):
            raise
        except Exception as e:
            reason = " ".join(str(e).split())[:160]
            raise SlideReadError(
                f"{self._slide.path}: cannot read the tile at ({place.x}, {place.y})"
                f" ({type(e).__name__}: {reason}); see that the file is whole and can be reached,"
                " and start the same command again"
            ) from e
        if tile.shape != (side, side, 3) or tile.dtype != np.uint8:
            raise SlideReadError(
                f"{self._slide.path}: the reader gave {tile.dtype} {tile.shape} for a tile of"
                f" {side} px at ({place.x}, {place.y})"
            )
        return tile if self._matrix is None else apply_matrix(tile, self._matrix)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what was not begun and wait for what was."""
        self._pool.shutdown(wait=True, cancel_futures=True)
