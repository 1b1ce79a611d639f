"""Plain image files, opened by Pillow under limits. Knows no slides, masks or labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from wsiseg.slides.backend_base import TIFF_ERRORS, short_message, without_warnings

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
    try:
        with _unlimited() as limit:
            image = Image.open(path, formats=FORMATS)
        with image:
            width, height = image.size
            if width * height > MAX_IMAGE_PX:
                raise ImageFileError(
                    f"{width} x {height} px is too large for a plain image (limit "
                    f"{MAX_IMAGE_PX // 1_000_000} megapixels)"
                )
            large = limit is not None and width * height > limit  # TIFF: looked at again
            with _unlimited() if large else nullcontext():
                yield image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as e:
        raise UnknownImageError("not an image of a format that is read") from e
    except MemoryError as e:
        raise ImageFileError("there is not enough memory to decode it") from e
    except (EOFError, Image.DecompressionBombError, *TIFF_ERRORS) as e:
        raise ImageFileError(short_message(e)) from e


@contextmanager
def _unlimited() -> Iterator[int | None]:
    """Pillow without its limit on pixels, which is the whole process's: one thread at a time.

    Gives the limit that holds before and after.
    """
    with without_warnings("PIL"):  # what it warns of ends in an error or is harmless
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield limit
        finally:
            Image.MAX_IMAGE_PIXELS = limit
