"""TIFF slides decoded by tiffslide. Knows no target resolution."""

from __future__ import annotations

import math
import threading
import warnings
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
)


class TiffSlideBackend:
    """A TIFF slide opened by tiffslide; reads are made one at a time."""

    name = "tiffslide"

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._slide = tiffslide.TiffSlide(path)
                raw = dict(self._slide.properties)
                self.level_sizes = tuple(Size(*size) for size in self._slide.level_dimensions)
                self.associated = _tiffslide_associated(self._slide)
        except TIFF_ERRORS as e:
            raise SlideError(f"{path}: damaged or unsupported TIFF ({short_message(e)})") from e
        self._path = path
        self._lock = threading.Lock()
        self.properties = {key: str(value) for key, value in raw.items() if value is not None}
        self.vendor = self.properties.get("tiffslide.vendor", "generic-tiff")
        self.level_downsamples = tuple(float(d) for d in self._slide.level_downsamples)
        try:
            self.read_level(0, Box(0, 0, 1, 1))
        except SlideReadError as e:
            self.close()
            raise SlideError(str(e)) from e

    def read_level(self, level: int, box: Box) -> UInt8:
        """See `Backend.read_level`."""
        downsample = self.level_downsamples[level]
        location = (math.ceil(box.x * downsample - 1e-6), math.ceil(box.y * downsample - 1e-6))
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


def _tiffslide_associated(slide: tiffslide.TiffSlide) -> dict[str, Size]:
    """Sizes of the associated images, from their series."""
    series: dict[str, Any] = slide.associated_images.series_map
    return {name: Size(int(s.shape[1]), int(s.shape[0])) for name, s in series.items()}
