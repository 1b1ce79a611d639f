"""Slides of unlabelled tissue: every crop is read from the file. Knows no sources, no networks.

Of a slide only the places of its tissue are held; a bounded number of slides is open.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsiseg.datasets.augment import random_crop
from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box
from wsiseg.slides.slide import COARSE, Slide, open_slide
from wsiseg.training.tile_places import find_places, kept_places

UInt8 = npt.NDArray[np.uint8]
OPEN_SLIDES = 32
"""Slides that are open at once."""
PROBES = 10
"""Places of a slide that are looked at, before it counts as one that cannot be read."""
_VIEWS = 0x71E5  # seed of the places of a slide's views


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
        places: its squares with tissue.
        short_px: infinite; what lies beyond a small slide is white.
    """

    short_px = float("inf")

    def __init__(
        self,
        path: Path,
        own_mpp: float | None,
        mpp: float,
        slides: OpenSlides,
        kept: Path | None = None,
    ) -> None:
        """Find the tissue, or take what `kept_places` has of it below the folder `kept`.

        Says where the resolution is doubtful, and where the slide is interpolated.

        Raises:
            SlideError: the slide cannot be read, or has no tissue; its resolution is not known.
        """
        self.path, self._own_mpp, self._mpp, self._slides = path, own_mpp, mpp, slides
        with slides.use(path, own_mpp) as slide:
            slide.grid(mpp)  # refuses slides that are too coarse
            self.places = kept_places(kept, path, own_mpp, lambda: find_places(slide))
            doubts = [text.partition("; ")[0] for text in slide.warnings]  # no options of commands
            if slide.mpp > COARSE * mpp:
                doubts.append(f"its pixels of {slide.mpp:g} um are enlarged to {mpp:g} um")
        self._probe()
        for text in doubts:
            said = f"{path}: {text}; set mpp of its source if that is wrong"
            warnings.warn(said, stacklevel=2)

    def crop(self, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8:
        """A random crop around a random place with tissue."""
        return random_crop(self._region(size_px / scale[0], rng), size_px, rng, scale=scale)

    def view(self, size_px: int, number: int = 0) -> UInt8:
        """The crop around the middle square of tissue; of other numbers, where they decide."""
        rng = np.random.default_rng((_VIEWS, number)) if number else None
        return np.asarray(self._region(size_px, rng))

    def check(self) -> None:
        """Nothing: some of it was read when it was found."""

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
            x, y = self.places.draw(rng)
            left = _inside(x / grid.downsample[0] - side / 2, grid.size.width - side)
            top = _inside(y / grid.downsample[1] - side / 2, grid.size.height - side)
            box = Box(left, top, side, side)
            try:
                return Image.fromarray(slide.read(box, grid))
            except SlideReadError:  # of OpenSlide, perhaps of damage that another thread met
                with open_slide(self.path, mpp=self._own_mpp) as own:
                    return Image.fromarray(own.read(box, grid))


def _inside(start: float, last: int) -> int:
    """A first pixel from 0 to `last`; the middle where the square is larger than the slide."""
    return last // 2 if last < 0 else int(min(max(start, 0), last))
