"""Plain images, decoded whole by Pillow. Knows no target resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Size
from wsiseg.slides.backend_base import NotThisBackend, UInt8, over_white
from wsiseg.slides.image_file import ImageFileError, UnknownImageError, open_image
from wsiseg.slides.limits import check_levels

_STRIP_PX = 1 << 23


class ImageBackend:
    """A plain PNG, JPEG or TIFF image, held in memory whole.

    Memory bound: 3 bytes per pixel of at most 500 megapixels; 4 more while it is decoded.
    """

    name = "image"
    vendor = "image"

    def __init__(self, path: Path) -> None:
        try:
            with open_image(path) as image:
                self.properties = _image_properties(image)
                if image.mode.startswith(("I", "F")):
                    raise SlideError(
                        f"{path}: not an 8-bit image (mode {image.mode}); convert it to 8-bit RGB"
                    )
                self._pixels = _decode(image)
        except UnknownImageError as e:
            raise NotThisBackend from e
        except ImageFileError as e:
            raise SlideError(
                f"{path}: damaged image ({e}); copy it again, or if it is large convert it to a "
                "pyramidal TIFF"
            ) from e
        height, width = self._pixels.shape[:2]
        self.level_sizes: tuple[Size, ...] = (Size(width, height),)
        self.level_downsamples: tuple[float, ...] = (1.0,)
        self.associated: dict[str, Size] = {}
        check_levels(path, self.level_sizes, ())

    def read_level(self, level: int, box: Box) -> UInt8:
        """See `Backend.read_level`."""
        return self._pixels[box.slices].copy()

    def close(self) -> None:
        """Let the pixels go."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _decode(image: Image.Image) -> UInt8:
    """(h, w, 3) uint8 RGB of a whole image, white under transparent pixels; strip by strip."""
    image.load()
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    step = max(1, _STRIP_PX // width)
    for top in range(0, height, step):
        strip = image.crop((0, top, width, min(height, top + step)))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            pixels[top : top + step] = over_white(np.asarray(strip.convert("RGBA")))
        else:
            pixels[top : top + step] = np.asarray(strip.convert("RGB"))
    return pixels


def _utf8(text: str) -> str:
    """A text that Pillow took for Latin-1, as UTF-8 where it is that: OME-XML is."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _image_properties(image: Image.Image) -> dict[str, str]:
    """Format and, of a TIFF, its resolution tags in OpenSlide's names."""
    properties = {"image.format": str(image.format), "image.mode": image.mode}
    tags: Any = getattr(image, "tag_v2", {})
    for name, tag in (("XResolution", 282), ("YResolution", 283)):
        if tag in tags:
            properties[f"tiff.{name}"] = str(float(tags[tag]))
    if 270 in tags:
        properties["tiff.ImageDescription"] = _utf8(str(tags[270]))
    unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2 if 282 in tags else 0))
    if unit:
        properties["tiff.ResolutionUnit"] = unit
    return properties
