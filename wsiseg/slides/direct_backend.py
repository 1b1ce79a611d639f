"""Tiled JPEG and JPEG 2000 slides, decoded straight from the file. Knows no target resolution.

OpenSlide says what the slide is; the pixels of levels whose chunks can be decoded alone come from
the bytes at their offsets, and are those that OpenSlide gives, bit for bit. The decoders are those
of OpenSlide, too: libjpeg-turbo, whose warnings of damage are errors here as there (simplejpeg),
and OpenJPEG (imagecodecs). What they refuse, OpenSlide is asked for, so that its errors are raised.
What takes OpenSlide long is laying chunks out, not decoding them.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box, Size
from wsiseg.slides.backend_base import Backend, NotThisBackend, UInt8
from wsiseg.slides.chunk_cache import ChunkCache
from wsiseg.slides.tiff_check import is_tiff
from wsiseg.slides.tiff_chunks import ChunkError, ChunkTable, read_tables

_CACHE_BYTES = 64 << 20
_VENDORS = ("aperio", "generic-tiff")


class DirectBackend:
    """A slide read by chunks; any thread may read, and threads do not wait for each other.

    Of the levels of an Aperio slide or a plain TIFF, those are read by chunks that hold 8-bit RGB
    as JPEG or as Aperio's JPEG 2000, whose downsample is a whole number (OpenSlide interpolates the
    others), and whose first chunk and chunk with the most bytes decode to what OpenSlide gives. All
    else comes from OpenSlide: other levels, and chunks that cannot be decoded.

    Memory bound: 64 MiB of decoded chunks beside what OpenSlide keeps.
    """

    name = "direct"

    def __init__(self, path: Path, openslide: Backend) -> None:
        """Takes over `openslide`, an open backend of the same file, unless it raises.

        Raises:
            NotThisBackend: level 0 cannot be read by chunks.
        """
        if openslide.vendor not in _VENDORS or not is_tiff(path):
            raise NotThisBackend
        self._tables = _tables_of_levels(openslide, read_tables(path))
        if 0 not in self._tables:
            raise NotThisBackend
        self._openslide = openslide
        self._file = _File(path)
        self._tables = {i: t for i, t in self._tables.items() if self._is_equal(i)}
        if 0 not in self._tables:
            self._file.close()
            raise NotThisBackend
        largest = max(prod(table.shape) for table in self._tables.values())
        self._cache = ChunkCache(_CACHE_BYTES, largest)
        self.vendor = openslide.vendor
        self.level_sizes = openslide.level_sizes
        self.level_downsamples = openslide.level_downsamples
        self.properties = openslide.properties
        self.associated = openslide.associated

    def read_level(self, level: int, box: Box) -> UInt8:
        """See `Backend.read_level`."""
        if level not in self._tables:
            return self._openslide.read_level(level, box)
        try:
            return self._read(level, box)
        except (ChunkError, OSError):
            return self._openslide.read_level(level, box)

    def close(self) -> None:
        """Release the file and the memory."""
        self._file.close()
        self._cache = ChunkCache(0, 1)
        self._openslide.close()

    def _read(self, level: int, box: Box) -> UInt8:
        table = self._tables[level]
        width, height = table.chunk
        result = np.empty((box.height, box.width, 3), np.uint8)
        for row in range(box.y // height, -(-box.bottom // height)):
            for column in range(box.x // width, -(-box.right // width)):
                number = row * table.columns + column
                x, y = column * width, row * height
                part = Box(x, y, width, height).intersection(box)
                inside = Box(part.x - x, part.y - y, part.width, part.height)
                place = Box(part.x - box.x, part.y - box.y, part.width, part.height)
                decode = partial(self._decode, level, number)
                with self._cache.chunk((level, number), table.shape, decode) as chunk:
                    result[place.slices] = chunk[inside.slices]
        return result

    def _decode(self, level: int, number: int, pixels: UInt8) -> None:
        """Fill an array with the pixels of a chunk.

        Raises:
            ChunkError, OSError: it cannot be read or decoded.
        """
        table = self._tables[level]
        data = self._file.read(int(table.offsets[number]), int(table.lengths[number]))
        table.decode(data, pixels)

    def _is_equal(self, level: int) -> bool:
        """Whether two chunks of a level have the pixels that OpenSlide gives."""
        table = self._tables[level]
        try:
            for number in {0, int(table.lengths.argmax())}:
                box = table.box(number)
                pixels = np.empty(table.shape, np.uint8)
                self._decode(level, number, pixels)
                expected = self._openslide.read_level(level, box)
                if not np.array_equal(pixels[: box.height, : box.width], expected):
                    return False
        except (ChunkError, OSError, SlideReadError):
            return False
        return True


class _File:
    """Bytes of a file, for any thread."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at an offset.

        Raises:
            OSError: they cannot be read, are not all there, or the file is closed.
        """
        if self._file.closed:
            raise OSError("the file is closed")
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), length, offset)
        else:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(length)
        if len(data) < length:
            raise OSError("the file ends early")
        return data

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _tables_of_levels(openslide: Backend, tables: list[ChunkTable]) -> dict[int, ChunkTable]:
    """The table of each level that is the only one of its size and lies on whole pixels."""
    by_size: dict[Size, list[ChunkTable]] = {}
    for table in tables:
        by_size.setdefault(table.size, []).append(table)
    return {
        level: by_size[size][0]
        for level, size in enumerate(openslide.level_sizes)
        if len(by_size.get(size, [])) == 1
        and list(openslide.level_sizes).count(size) == 1
        and openslide.level_downsamples[level].is_integer()
    }
