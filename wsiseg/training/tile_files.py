"""Files of unlabelled tissue, each read when a crop of it is wanted. Knows no sources, no networks.

Images are held at the target mpp up to a limit of bytes; an image that would be absurdly large
there, or nearly nothing, is refused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsiseg.datasets.augment import random_crop
from wsiseg.datasets.base import rgb
from wsiseg.datasets.checks import check_depth
from wsiseg.errors import DatasetError
from wsiseg.slides.backend_base import TIFF_ERRORS
from wsiseg.slides.backends import open_backend
from wsiseg.slides.image_file import FORMATS, MAX_IMAGE_PX
from wsiseg.training.tile_slides import OpenSlides, SlideFile

UInt8 = npt.NDArray[np.uint8]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
"""Read as plain images whatever their size; other files are looked into."""
SLIDE_PX = 4096
"""A TIFF with a longer side, or with several levels, is a slide."""
MOST_ENLARGED = 16.0
"""Times that an image may be enlarged to the target mpp; more is a wrong mpp."""
LEAST_PX = 8
"""Pixels of the shorter side of an image at the target mpp; less is none, or a wrong mpp."""


class TissueFile(Protocol):
    """A file that crops are cut from.

    Attributes:
        path: where it lies.
        short_px: length of the shorter side at the target mpp; infinite where it does not matter.
    """

    @property
    def path(self) -> Path: ...

    @property
    def short_px(self) -> float: ...

    def check(self) -> None:
        """Read some of it.

        Raises:
            SlideError, DatasetError: it cannot be read.
        """
        ...

    def crop(self, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8:
        """(size, size, 3) uint8 at a random place, magnification, flip and quarter turn."""
        ...

    def view(self, size_px: int, number: int = 0) -> UInt8:
        """(size, size, 3) uint8: always the same crop of a number, as it lies, at the target mpp.

        Number 0 is the middle. Images have no other; slides have as many as are asked for.
        """
        ...


class ImageCache:
    """The images used last, up to a limit of bytes; threads may share it."""

    def __init__(self, limit_bytes: int) -> None:
        """`held_bytes` says how much is kept; one image is kept whatever its size."""
        self._limit, self.held_bytes = limit_bytes, 0
        self._kept: OrderedDict[tuple[Path, float], Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, ratio: float) -> Image.Image:
        """The RGB image, over white, scaled by `ratio`, area-averaged when shrinking.

        Raises:
            DatasetError: the file is not a readable image.
        """
        key = (path, ratio)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        image = _read_image(path, ratio)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = image
                self.held_bytes += _bytes(image)
            while self.held_bytes > self._limit and len(self._kept) > 1:
                self.held_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return image


class ImageFile:
    """A plain image."""

    def __init__(self, path: Path, own_mpp: float | None, mpp: float, cache: ImageCache) -> None:
        """Look at the header; without `own_mpp` the image is used as it is.

        Raises:
            DatasetError: the file is no image, or grey of more than 8 bits, or its size at `mpp`
                cannot be meant.
        """
        self.path, self._cache = path, cache
        self._ratio = 1.0 if own_mpp is None else own_mpp / mpp
        with _opened(path) as image:
            check_depth(path, image)
            size = image.size
        _check_size(path, size, self._ratio, mpp)
        self.short_px = min(size) * self._ratio

    def check(self) -> None:
        """Decode the image, which is held from then on.

        Raises:
            DatasetError: it cannot be decoded.
        """
        self._cache.get(self.path, self._ratio)

    def crop(self, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8:
        """A random crop; one that would not fit is magnified until it does."""
        return random_crop(self._cache.get(self.path, self._ratio), size_px, rng, scale=scale)

    def view(self, size_px: int, number: int = 0) -> UInt8:
        """The middle of the image, whatever the number; magnified where the image is smaller."""
        image = self._cache.get(self.path, self._ratio)
        side = min(size_px, *image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box))


def open_file(
    path: Path,
    own_mpp: float | None,
    mpp: float,
    cache: ImageCache,
    slides: OpenSlides,
    kept: Path | None = None,
) -> TissueFile:
    """A slide or an image, ready to be sampled at `mpp`; `kept` as of `SlideFile`.

    Raises:
        SlideError, DatasetError: it cannot be used.
    """
    if is_slide(path):
        return SlideFile(path, own_mpp, mpp, slides, kept)
    return ImageFile(path, own_mpp, mpp, cache)


def is_slide(path: Path) -> bool:
    """Whether a file is read as a slide: a pyramid, a large TIFF, or a scanner's format.

    Raises:
        SlideError: the file is neither a slide nor an image.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return False
    backend = open_backend(path, "auto")
    try:
        if path.suffix.lower() not in (".tif", ".tiff"):
            return backend.name != "image"
        several = len(backend.level_sizes) > 1
        return several or (backend.name != "image" and max(backend.level_sizes[0]) > SLIDE_PX)
    finally:
        backend.close()


def _check_size(path: Path, size: tuple[int, int], ratio: float, mpp: float) -> None:
    """Refuse an image of (width, height) that is absurd once it is scaled by `ratio`.

    Raises:
        DatasetError: too large or too small.
    """
    width, height = (side * ratio for side in size)
    if ratio > MOST_ENLARGED or width * height > MAX_IMAGE_PX:
        raise DatasetError(
            f"{path}: {ratio * mpp:g} um per pixel is too coarse to be read at {mpp:g}: that makes "
            f"{width:.0f} x {height:.0f} px of {size[0]} x {size[1]}; set mpp of its source right, "
            "in micrometres"
        )
    if min(width, height) < LEAST_PX:
        raise DatasetError(
            f"{path}: {size[0]} x {size[1]} px, which are {width:.2g} x {height:.2g} at {mpp:g} um "
            "per pixel, show nothing; set mpp of its source right, in micrometres"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image under Pillow's own limit: threads decode several at once.

    Raises:
        DatasetError: it is none, damaged or too large, also where that shows inside the block.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Image.DecompressionBombError as e:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or MAX_IMAGE_PX) // 1_000_000
        raise DatasetError(
            f"{path}: more than {limit} megapixels are too many to be decoded at once; convert it "
            "to a pyramidal TIFF, which is read in pieces, as a slide"
        ) from e
    except (*TIFF_ERRORS, EOFError) as e:
        raise DatasetError(f"{path}: not a readable image ({e})") from e


def _read_image(path: Path, ratio: float) -> Image.Image:
    with _opened(path) as file:
        image = Image.fromarray(rgb(file))
    if ratio == 1:
        return image
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC)


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # Pillow keeps RGB in four bytes a pixel
