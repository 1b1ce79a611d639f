"""Points, sizes, boxes and the grid of pixels at one resolution. Knows no files and no images.

Coordinates are (x, y), sizes (width, height), as in OpenSlide; arrays are [y, x].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    """A place in pixels of some grid."""

    x: int
    y: int


class Size(NamedTuple):
    """An extent in pixels of some grid."""

    width: int
    height: int


class Box(NamedTuple):
    """A rectangle in pixels of some grid: [x, x + width) x [y, y + height)."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """First column after the box."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """First row after the box."""
        return self.y + self.height

    @property
    def slices(self) -> tuple[slice, slice]:
        """The box as (rows, columns) for indexing a [y, x] array."""
        return slice(self.y, self.bottom), slice(self.x, self.right)

    def cells(self, side: int) -> Iterator[tuple[int, int]]:
        """(row, column) of the squares of a grid of `side` that the box touches, row by row."""
        for row in range(self.y // side, -(-self.bottom // side)):
            for column in range(self.x // side, -(-self.right // side)):
                yield row, column

    def intersection(self, other: Box) -> Box:
        """The common rectangle; width or height 0 where there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width = max(0, min(self.right, other.right) - x)
        height = max(0, min(self.bottom, other.bottom) - y)
        return Box(x, y, width, height)

    def is_empty(self) -> bool:
        """Whether the box holds no pixel."""
        return self.width <= 0 or self.height <= 0


@dataclass(frozen=True)
class Grid:
    """The pixels of a slide at one resolution, covering exactly the extent of its level 0.

    The size is level 0 scaled by the ratio of the resolutions and rounded to whole pixels, at
    least 1; so that grid and level 0 cover the same extent, `downsample` is the exact ratio of
    the two sizes along each axis, and `mpp_x`, `mpp_y` follow from it.

    Attributes:
        level0: size of level 0 in pixels.
        level0_mpp: micrometres per pixel of level 0.
        mpp: the resolution that was asked for, micrometres per pixel.
        size: size of the grid in its own pixels.
    """

    level0: Size
    level0_mpp: float
    mpp: float
    size: Size

    @classmethod
    def at_mpp(cls, level0: Size, level0_mpp: float, mpp: float) -> Grid:
        """The grid over a level 0 of the given size and resolution, at `mpp` um per pixel.

        Raises:
            ValueError: a size or resolution that is not positive and finite.
        """
        if not all(math.isfinite(v) and v > 0 for v in (level0_mpp, mpp, *level0)):
            raise ValueError(f"sizes and resolutions must be positive: {level0} {level0_mpp} {mpp}")
        ratio = level0_mpp / mpp
        size = Size(max(1, round(level0.width * ratio)), max(1, round(level0.height * ratio)))
        return cls(Size(*level0), float(level0_mpp), float(mpp), size)

    @property
    def downsample(self) -> tuple[float, float]:
        """Level-0 pixels per grid pixel along (x, y), exact."""
        return self.level0.width / self.size.width, self.level0.height / self.size.height

    @property
    def mpp_x(self) -> float:
        """Micrometres per grid pixel along x, exact."""
        return self.level0_mpp * self.downsample[0]

    @property
    def mpp_y(self) -> float:
        """Micrometres per grid pixel along y, exact."""
        return self.level0_mpp * self.downsample[1]

    @property
    def box(self) -> Box:
        """The whole grid as a box."""
        return Box(0, 0, *self.size)

    @property
    def pixel_area_um2(self) -> float:
        """Area of one grid pixel in square micrometres."""
        return self.mpp_x * self.mpp_y

    def to_level0(self, x: float, y: float) -> tuple[float, float]:
        """A grid place in level-0 pixels."""
        return x * self.level0.width / self.size.width, y * self.level0.height / self.size.height
