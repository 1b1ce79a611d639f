"""Slides decoded by OpenSlide. Knows no target resolution."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Size
from wsiseg.slides.backend_base import NotThisBackend, UInt8, over_white, unreadable
from wsiseg.slides.limits import check_levels

_BLOCK_PX = 512
_BLOCKS_KEPT = 64
_UNSUPPORTED = "Unsupported TIFF compression"
"""How OpenSlide begins what it says of a file that is whole, but not for it."""


class OpenSlideBackend:
    """A slide opened by OpenSlide; any thread may read.

    OpenSlide takes places in level-0 pixels and interpolates where such a place is no whole pixel
    of the level. So that a pixel always has the same value, levels whose downsample is not a whole
    number are read in fixed blocks, of which the last 64 (50 MB) are kept.
    """

    name = "openslide"

    def __init__(self, path: Path) -> None:
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as e:
            raise NotThisBackend from e
        except openslide.OpenSlideError as e:
            if str(e).startswith(_UNSUPPORTED):
                raise NotThisBackend from e
            raise SlideError(f"{path}: damaged or unreadable slide ({e}); copy it again") from e
        self._path = path
        self.properties = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        self.level_sizes = tuple(Size(*size) for size in self._slide.level_dimensions)
        self.level_downsamples = tuple(float(d) for d in self._slide.level_downsamples)
        self.associated = _openslide_associated(self.properties)
        self._blocks: OrderedDict[tuple[int, int, int], UInt8] = OrderedDict()
        self._lock = threading.Lock()
        try:
            check_levels(path, self.level_sizes, _tile_sizes(self.properties))
        except SlideError:
            self.close()
            raise

    def read_level(self, level: int, box: Box) -> UInt8:
        """See `Backend.read_level`."""
        if self.level_downsamples[level].is_integer():
            return self._read_direct(level, box)
        result = np.empty((box.height, box.width, 3), np.uint8)
        for row in range(box.y // _BLOCK_PX, -(-box.bottom // _BLOCK_PX)):
            for column in range(box.x // _BLOCK_PX, -(-box.right // _BLOCK_PX)):
                block = Box(column * _BLOCK_PX, row * _BLOCK_PX, _BLOCK_PX, _BLOCK_PX)
                block = block.intersection(Box(0, 0, *self.level_sizes[level]))
                part = block.intersection(box)
                inside = Box(part.x - block.x, part.y - block.y, part.width, part.height)
                place = Box(part.x - box.x, part.y - box.y, part.width, part.height)
                result[place.slices] = self._block(level, row, column, block)[inside.slices]
        return result

    def _block(self, level: int, row: int, column: int, box: Box) -> UInt8:
        key = (level, row, column)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        pixels = self._read_direct(level, box)
        with self._lock:
            self._blocks[key] = pixels
            while len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return pixels

    def _read_direct(self, level: int, box: Box) -> UInt8:
        downsample = self.level_downsamples[level]
        location = (round(box.x * downsample), round(box.y * downsample))
        try:
            region = self._slide.read_region(location, level, (box.width, box.height))
        except openslide.OpenSlideError as e:
            self._renew()
            raise unreadable(self._path, level, box, e) from e
        return over_white(np.asarray(region))

    def _renew(self) -> None:
        """Open the file again: after an error OpenSlide refuses all that is not damaged, too.

        The old handle ends with the last thread that still reads from it.
        """
        with self._lock, suppress(openslide.OpenSlideError):
            self._slide = openslide.OpenSlide(self._path)

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


def _tile_sizes(properties: dict[str, str]) -> Iterator[Size]:
    """Sizes of the tiles of the levels that have any."""
    for key, width in properties.items():
        if key.startswith("openslide.level[") and key.endswith(".tile-width"):
            height = properties.get(key.removesuffix("width") + "height", "0")
            yield Size(int(width), int(height))


def _openslide_associated(properties: dict[str, str]) -> dict[str, Size]:
    """Sizes of the associated images, from their properties."""
    found: dict[str, Size] = {}
    for key, width in properties.items():
        if key.startswith("openslide.associated.") and key.endswith(".width"):
            name = key.removeprefix("openslide.associated.").removesuffix(".width")
            found[name] = Size(int(width), int(properties[key.removesuffix("width") + "height"]))
    return found
