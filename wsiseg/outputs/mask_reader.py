"""Reads tiles of a `<slide>.mask.ome.tif` that wsiseg wrote. Knows no colours and no slides."""

from __future__ import annotations

import logging
import struct
import threading
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.errors import OutputError
from wsiseg.geometry import Size

logging.getLogger("tifffile").addHandler(logging.NullHandler())

UInt8 = npt.NDArray[np.uint8]
TILE_PX = 512
_DAMAGE = (
    tifffile.TiffFileError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    struct.error,
)


class MaskReader:
    """An open mask; any number of threads may read it.

    Attributes:
        path: the file.
        sizes: of its levels, the finest first. Pixel (x, y) of level k is pixel
            (x * 2**k, y * 2**k) of level 0.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a mask.

        Raises:
            OutputError: the file is missing, damaged or no mask of wsiseg.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._file = tifffile.TiffFile(self.path)
        except _DAMAGE as e:
            raise self._unreadable(e) from e
        try:
            self._pages = [page for page in self._file.pages if _is_level(page)]
            self.sizes = [Size(int(p.imagewidth), int(p.imagelength)) for p in self._pages]
        except _DAMAGE as e:
            self.close()
            raise self._unreadable(e) from e
        if not self.sizes or not _halve(self.sizes):
            self.close()
            raise OutputError(f"{self.path}: not a mask that wsiseg wrote; make it again")

    def __enter__(self) -> MaskReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def check_length(self) -> None:
        """See that the file holds all its tiles, whatever is in them.

        Raises:
            OutputError: it is cut off.
        """
        try:
            size = self.path.stat().st_size
            ends = [
                start + count
                for page in self._pages
                for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)
            ]
        except _DAMAGE as e:
            raise self._unreadable(e) from e
        if max(ends) > size:
            raise OutputError(f"{self.path}: the mask is cut off; make it again")

    def tile(self, level: int, column: int, row: int) -> UInt8:
        """(h, w) uint8 labels of a tile, 512 px or what the level has left.

        Raises:
            OutputError: the file is damaged there.
            IndexError: there is no such tile.
        """
        if not 0 <= level < len(self.sizes):
            raise IndexError(f"no level {level}")
        width, height = self.sizes[level]
        columns, rows = -(-width // TILE_PX), -(-height // TILE_PX)
        if not (0 <= column < columns and 0 <= row < rows):
            raise IndexError(f"no tile {column}, {row}")
        page, index = self._pages[level], row * columns + column
        try:
            with self._lock:
                handle = self._file.filehandle
                handle.seek(page.dataoffsets[index])
                data = handle.read(page.databytecounts[index])
            pixels = np.asarray(page.decode(data, index)[0], np.uint8)
            whole = pixels.reshape(pixels.shape[-3], pixels.shape[-2])
        except _DAMAGE as e:
            raise self._unreadable(e) from e
        return whole[: height - row * TILE_PX, : width - column * TILE_PX]

    def _unreadable(self, error: BaseException) -> OutputError:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return OutputError(f"{self.path}: the mask cannot be read ({reason}); make it again")


def _is_level(page: tifffile.TiffPage) -> bool:
    """Whether a page holds labels in tiles of the size that wsiseg writes."""
    return bool(
        page.is_tiled
        and (page.tilewidth, page.tilelength) == (TILE_PX, TILE_PX)
        and page.dtype == np.uint8
        and page.samplesperpixel == 1
    )


def _halve(sizes: list[Size]) -> bool:
    """Whether each level is half the one before, rounded up."""
    return all(
        small == Size(-(-large.width // 2), -(-large.height // 2))
        for large, small in pairwise(sizes)
    )
