"""Files of unlabelled tissue, each read when a crop of it is wanted. Knows no sources, no networks.

Images are held at the target mpp up to a limit of bytes. Of slides only the tissue's place is
held; every crop is read from the file, of which a bounded number is open.
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
from wsiseg.errors import DatasetError, SlideError, SlideReadError
from wsiseg.geometry import Box
from wsiseg.slides.backend_base import TIFF_ERRORS
from wsiseg.slides.backends import open_backend
from wsiseg.slides.slide import Slide, open_slide

UInt8 = npt.NDArray[np.uint8]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
"""Read as plain images whatever their size; other files are looked into."""
SLIDE_PX = 4096
"""A TIFF with a longer side, or with several levels, is a slide."""
BLOCK_UM = 256.0
"""Side of the squares of which those with tissue are remembered."""
OPEN_SLIDES = 32
"""Slides that are open at once."""
PROBES = 10
"""Places of a slide that are looked at, before it counts as one that cannot be read."""
_VIEWS = 0x71E5  # seed of the places of a slide's views


class TissueFile(Protocol):
    """A file that crops are cut from.

    Attributes:
        path: where it lies.
    """

    @property
    def path(self) -> Path: ...

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
        """The RGB image scaled by `ratio`, area-averaged when shrinking.

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

    def __init__(self, path: Path, ratio: float, cache: ImageCache) -> None:
        """Check that the file is an image; `ratio` is its own mpp over the target's.

        Raises:
            DatasetError: it is none.
        """
        self.path, self._ratio, self._cache = path, ratio, cache
        with _image_errors(path), Image.open(path):
            pass

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


class OpenSlides:
    """The slides used last, at most `limit` of them and those in use; threads may share it."""

    def __init__(self, limit: int = OPEN_SLIDES) -> None:
        self._limit = limit
        self._open: OrderedDict[tuple[Path, float | None], Slide] = OrderedDict()
        self._users: dict[tuple[Path, float | None], int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: Path, mpp: float | None) -> Iterator[Slide]:
        """The slide, open as long as the block lasts."""
        with self._lock:
            key = (path, mpp)
            if key not in self._open:
                self._open[key] = open_slide(path, mpp=mpp)
            self._open.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            slide = self._open[key]
        try:
            yield slide
        finally:
            with self._lock:
                self._users[key] -= 1
                self._close(len(self._open) - self._limit)

    def close(self) -> None:
        """Close all slides that are not in use."""
        with self._lock:
            self._close(len(self._open))

    def _close(self, count: int) -> None:
        for key in [k for k in self._open if not self._users.get(k)][: max(0, count)]:
            self._open.pop(key).close()


class SlideFile:
    """A slide, sampled where it has tissue.

    Attributes:
        path: the file.
        blocks: (n, 2) int32 x, y in level-0 pixels: centres of the squares of `BLOCK_UM` of which
            more than half is tissue.
    """

    def __init__(self, path: Path, own_mpp: float | None, mpp: float, slides: OpenSlides) -> None:
        """Find the tissue.

        Raises:
            SlideError: the slide cannot be read, or has no tissue; its resolution is not known.
        """
        from wsiseg.slides.tissue import find_tissue

        self.path, self._own_mpp, self._mpp, self._slides = path, own_mpp, mpp, slides
        with slides.use(path, own_mpp) as slide:
            slide.grid(mpp)  # refuses slides that are too coarse
            tissue = find_tissue(slide, "auto")
            grid, side = slide.grid(slide.mpp), max(1, round(BLOCK_UM / slide.mpp))
            centres = [
                (x + side // 2, y + side // 2)
                for y in range(0, grid.size.height, side)
                for x in range(0, grid.size.width, side)
                if _tissue_share(tissue.mask, Box(x, y, side, side), grid.size) > 0.5
            ]
        self.blocks = np.array(centres, np.int32).reshape(-1, 2)
        if not centres:
            raise SlideError(f"{path}: no tissue found on this slide")
        self._probe()

    def crop(self, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8:
        """A random crop around a random place in a random block."""
        return random_crop(self._region(size_px / scale[0], rng), size_px, rng, scale=scale)

    def view(self, size_px: int, number: int = 0) -> UInt8:
        """The crop around the middle block; of other numbers, at a place that they decide."""
        rng = np.random.default_rng((_VIEWS, number)) if number else None
        return np.asarray(self._region(size_px, rng))

    def _probe(self) -> None:
        """Refuse a slide of which the overview can be read, but the tissue nowhere."""
        for number in range(PROBES):
            try:
                self.view(1, number)
                return
            except SlideReadError:
                if number == PROBES - 1:
                    raise

    def _region(self, side_px: float, rng: np.random.Generator | None) -> Image.Image:
        """A square of `side_px`, rounded up, at the target mpp; white beyond the slide."""
        side = int(np.ceil(side_px))
        with self._slides.use(self.path, self._own_mpp) as slide:
            grid = slide.grid(self._mpp)
            if rng is None:
                x, y = (float(v) for v in self.blocks[len(self.blocks) // 2])
            else:
                reach = BLOCK_UM / slide.mpp / 2
                x, y = self.blocks[rng.integers(len(self.blocks))] + rng.uniform(-reach, reach, 2)
            left = _inside(x / grid.downsample[0] - side / 2, grid.size.width - side)
            top = _inside(y / grid.downsample[1] - side / 2, grid.size.height - side)
            box = Box(left, top, side, side)
            try:
                return Image.fromarray(slide.read(box, grid))
            except SlideReadError:  # of OpenSlide, perhaps of damage that another thread met
                with open_slide(self.path, mpp=self._own_mpp) as own:
                    return Image.fromarray(own.read(box, grid))


def open_file(
    path: Path, own_mpp: float | None, mpp: float, cache: ImageCache, slides: OpenSlides
) -> TissueFile:
    """A slide or an image, ready to be sampled at `mpp`.

    Raises:
        SlideError, DatasetError: it cannot be used.
    """
    if is_slide(path):
        return SlideFile(path, own_mpp, mpp, slides)
    return ImageFile(path, 1.0 if own_mpp is None else own_mpp / mpp, cache)


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


def _inside(start: float, last: int) -> int:
    """A first pixel from 0 to `last`; the middle where the square is larger than the slide."""
    return last // 2 if last < 0 else int(min(max(start, 0), last))


def _tissue_share(mask: npt.NDArray[np.bool_], box: Box, size: tuple[int, int]) -> float:
    """Share of the mask's pixels under a box of an image of the given size that are tissue."""
    (width, height), (rows, columns) = size, mask.shape
    top, left = box.y * rows // height, box.x * columns // width
    bottom = max(top + 1, min(rows, -(-(box.y + box.height) * rows // height)))
    right = max(left + 1, min(columns, -(-(box.x + box.width) * columns // width)))
    return float(mask[top:bottom, left:right].mean())


@contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (*TIFF_ERRORS, EOFError, Image.DecompressionBombError) as e:
        raise DatasetError(f"{path}: not a readable image ({e})") from e


def _read_image(path: Path, ratio: float) -> Image.Image:
    with _image_errors(path), Image.open(path) as file:
        image = file.convert("RGB")
    if ratio == 1:
        return image
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC)


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # Pillow keeps RGB in four bytes a pixel
