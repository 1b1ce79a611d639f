"""What inference asks of a slide and of a tissue mask. Knows no implementation of either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box, Grid, Size

Progress = Callable[[int, int], None]
"""Called with (tiles encoded, tiles in all) as the work goes on."""


class SlideLike(Protocol):
    """A slide that is open; `wsiseg.slides.slide.Slide` is one."""

    @property
    def path(self) -> Path:
        """Its file."""

    @property
    def backend(self) -> str:
        """The library that reads it."""

    @property
    def vendor(self) -> str:
        """The scanner's format."""

    @property
    def size(self) -> Size:
        """Size of level 0."""

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of level 0."""

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from."""

    @property
    def bounds(self) -> Box | None:
        """The part of the file's level 0 that is the slide, where the file states one."""

    @property
    def frame(self) -> str:
        """The frame of level 0: "qupath" (cropped to the bounds) or "openslide"."""

    @property
    def quickhash(self) -> str | None:
        """A digest that names the slide."""

    def grid(self, mpp: float) -> Grid:
        """Its pixels at `mpp` micrometres per pixel."""

    def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB of a box, white outside; may be called from several threads."""

    def thumbnail(self, max_px: int) -> npt.NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB picture of all of it, no side longer than `max_px`."""


class TissueLike(Protocol):
    """Where there is tissue; `wsiseg.slides.tissue.TissueMask` is one."""

    @property
    def mask(self) -> npt.NDArray[Any]:
        """(h, w) bool over the whole slide, at the resolution of the detection."""

    def covers(self, box: Box, grid: Grid) -> bool:
        """Whether any pixel of the box is tissue."""

    def region(self, box: Box, grid: Grid) -> npt.NDArray[np.bool_]:
        """(h, w) bool, which pixels of the box are tissue."""
