"""Plain image files, opened by Pillow under limits. Knows no slides, masks or labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from wsiseg.slides.backend_base import TIFF_ERRORS, short_message

MAX_IMAGE_PX = 500_000_000
"""Pixels of an image, which is decoded whole, in 2 GB and more."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what is opened. Not all that Pillow knows: it runs Ghostscript for an EPS file,
whatever the file is called."""


class ImageFileError(Exception):
    """An image that cannot be used; says why in half a line (inside rooms only)."""


class UnknownImageError(ImageFileError):
    """A file of none of the formats (inside rooms only)."""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image whose header is read; what is done with it inside the block may decode it.

    Raises:
        FileNotFoundError: there is no such file.
        UnknownImageError: it is no image of FORMATS.
        ImageFileError: it is damaged or too large, also where that shows inside the block.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of ends in an error or is harmless
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PX:
                    raise ImageFileError(
                        f"{width} x {height} px is too large for a plain image (limit "
                        f"{MAX_IMAGE_PX // 1_000_000} megapixels)"
                    )
                yield image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as e:
        raise UnknownImageError("not an image of a format that is read") from e
    except MemoryError as e:
        raise ImageFileError("there is not enough memory to decode it") from e
    except (EOFError, *TIFF_ERRORS) as e:
        raise ImageFileError(short_message(e)) from e
    finally:
        Image.MAX_IMAGE_PIXELS = limit
