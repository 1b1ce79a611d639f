"""Plain images, decoded whole by Pillow. Knows no target resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Size
from wsiseg.slides.backend_base import NotThisBackend, UInt8, over_white, short_message

MAX_IMAGE_PX = 500_000_000


class ImageBackend:
    """A plain PNG, JPEG or TIFF image, held in memory whole.

    Memory bound: 3 bytes per pixel of at most 500 megapixels.
    """

    name = "image"
    vendor = "image"

    def __init__(self, path: Path) -> None:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as image:
                self.properties = _image_properties(path, image)
                self._pixels = _decode(path, image)
        except UnidentifiedImageError as e:
            raise NotThisBackend from e
        except (OSError, SyntaxError, ValueError, EOFError) as e:
            raise SlideError(f"{path}: damaged image ({short_message(e)}); copy it again") from e
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        height, width = self._pixels.shape[:2]
        self.level_sizes: tuple[Size, ...] = (Size(width, height),)
        self.level_downsamples: tuple[float, ...] = (1.0,)
        self.associated: dict[str, Size] = {}

    def read_level(self, level: int, box: Box) -> UInt8:
        """See `Backend.read_level`."""
        return self._pixels[box.slices].copy()

    def close(self) -> None:
        """Let the pixels go."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _decode(path: Path, image: Image.Image) -> UInt8:
    """(h, w, 3) uint8 RGB of a whole image, white under transparent pixels."""
    width, height = image.size
    if width * height > MAX_IMAGE_PX:
        raise SlideError(
            f"{path}: {width} x {height} px is too large for a plain image (limit "
            f"{MAX_IMAGE_PX // 1_000_000} megapixels); convert it to a pyramidal TIFF"
        )
    if image.mode.startswith(("I", "F")):
        raise SlideError(f"{path}: not an 8-bit image (mode {image.mode}); convert it to 8-bit RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _image_properties(path: Path, image: Image.Image) -> dict[str, str]:
    """Format and, of a TIFF, its resolution tags in OpenSlide's names."""
    properties = {"image.format": str(image.format), "image.mode": image.mode}
    tags: Any = getattr(image, "tag_v2", {})
    for name, tag in (("XResolution", 282), ("YResolution", 283)):
        if tag in tags:
            properties[f"tiff.{name}"] = str(float(tags[tag]))
    if 270 in tags:
        properties["tiff.ImageDescription"] = str(tags[270])
    unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2 if 282 in tags else 0))
    if unit:
        properties["tiff.ResolutionUnit"] = unit
    return properties
