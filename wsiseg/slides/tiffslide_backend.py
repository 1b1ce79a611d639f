"""TIFF slides decoded by tiffslide. Knows no target resolution."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiffslide

from wsiseg.errors import SlideError, SlideReadError
from wsiseg.geometry import Box, Size
from wsiseg.slides.backend_base import (
    TIFF_ERRORS,
    UInt8,
    over_white,
    short_message,
    unreadable,
    without_warnings,
)
from wsiseg.slides.limits import MAX_CHUNK_PX, check_levels
from wsiseg.slides.stream_size import stated_size
from wsiseg.slides.tiff_check import check_tiff

_BOUNDED = {1, 5, 8, 32773, 32946, 34925, 50000}
"""Compressions that are unpacked into as many bytes as the TIFF states, and no more: none, LZW,
DEFLATE (two numbers), PackBits, LZMA, Zstandard."""
_STATED = {7, 33003, 33004, 33005, 34712}
"""Compressions whose streams state a size of their own: JPEG, JPEG 2000 (four numbers)."""

logging.getLogger("tifffile").addHandler(logging.NullHandler())
# what tifffile finds odd it would write to the terminal, several lines for one damaged slide


class TiffSlideBackend:
    """A TIFF slide opened by tiffslide; reads are made one at a time."""

    name = "tiffslide"

    def __init__(self, path: Path) -> None:
        check_tiff(path)
        try:
            with without_warnings("tiffslide", "tifffile", "zarr", "fsspec"):
                self._slide = tiffslide.TiffSlide(path)
                _prepare_levels(self._slide)
                raw = dict(self._slide.properties)
                self.level_sizes = tuple(Size(*size) for size in self._slide.level_dimensions)
                self.associated = _tiffslide_associated(self._slide)
        except TIFF_ERRORS as e:
            if hasattr(self, "_slide"):
                self.close()
            raise SlideError(f"{path}: damaged or unsupported TIFF ({short_message(e)})") from e
        self._path = path
        self._lock = threading.Lock()
        self.properties = {key: str(value) for key, value in raw.items() if value is not None}
        self.vendor = self.properties.get("tiffslide.vendor", "generic-tiff")
        self.level_downsamples = tuple(float(d) for d in self._slide.level_downsamples)
        try:
            check_levels(path, self.level_sizes, ())
            self.read_level(0, Box(0, 0, 1, 1))
        except SlideReadError as e:
            self.close()
            raise SlideError(str(e)) from e
        except SlideError:
            self.close()
            raise

    def read_level(self, level: int, box: Box) -> UInt8:
        """See `Backend.read_level`."""
        downsample = self.level_downsamples[level]
        location = (_level0(box.x, downsample), _level0(box.y, downsample))
        try:
            with self._lock:
                pixels = self._slide.read_region(
                    location, level, (box.width, box.height), as_array=True
                )
        except TIFF_ERRORS as e:
            raise unreadable(self._path, level, box, e) from e
        if pixels.dtype != np.uint8 or pixels.shape[-1] not in (1, 3, 4):
            raise SlideReadError(
                f"{self._path}: not an 8-bit RGB slide "
                f"({pixels.shape[-1]} channels of {pixels.dtype}); convert it to 8-bit RGB"
            )
        if pixels.shape[-1] == 1:
            return np.repeat(pixels, 3, axis=-1)
        return pixels if pixels.shape[-1] == 3 else over_white(pixels)

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


def _level0(start: int, downsample: float) -> int:
    """The first pixel of level 0 that tiffslide, which rounds down, takes to a pixel of a level."""
    place = math.ceil(start * downsample - 1e-6)
    while int(place / downsample) < start:
        place += 1
    return place


def _prepare_levels(slide: tiffslide.TiffSlide) -> None:
    """Have chunks that are not there read as white, and those that state a huge size not decoded.

    Raises:
        ValueError: a compression that cannot be kept within bounds.
    """
    for series in slide.ts_tifffile.series:
        for level in series.levels:
            page = level.keyframe
            if page.dtype == np.uint8:
                page.nodata = 255
            number = int(page.compression)
            if number in _STATED:
                page.__dict__["decode"] = _guarded(page.decode)
            elif number not in _BOUNDED:
                raise ValueError(f"compression {number} is not read; convert it to JPEG or DEFLATE")


def _guarded(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder of tifffile that refuses streams of more than MAX_CHUNK_PX pixels."""

    def guarded(data: bytes | None, *args: Any, **options: Any) -> Any:
        size = stated_size(data) if data is not None else None
        if size is not None and not 0 < size.width * size.height <= MAX_CHUNK_PX:
            raise ValueError(f"a tile whose stream states {size.width} x {size.height} px")
        return decode(data, *args, **options)

    return guarded


def _tiffslide_associated(slide: tiffslide.TiffSlide) -> dict[str, Size]:
    """Sizes of the associated images, from their series."""
    series: dict[str, Any] = slide.associated_images.series_map
    return {name: Size(int(s.shape[1]), int(s.shape[0])) for name, s in series.items()}
