"""Where tissue and glands of a synthetic slide lie. Knows no pixels and no colours.

Everything is a function of the place and the seed, in micrometres, so that any part of a slide can
be laid out without the rest. Tissue is a set of ragged islands. Glands stand in rows, a row in
segments; each segment is filled from its own random numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

SHAPES_PER_CLASS = 16
HALO_UM = 14.0
_ROW_UM = (92.0, 132.0)
_BAND_UM = 2 * sum(_ROW_UM)
_SEGMENT_UM = 900.0
_GAP_UM = 11.0
_ISLAND_UM = 9000.0
_EDGE_UM = 30.0
_SWAY_UM = 80.0
_TABLE = 256


class Shape(NamedTuple):
    """The outline of a gland around its centre.

    `semi` are half width and half height in um; `waves` (order, amplitude, phase) bend the ellipse.
    """

    number: int
    semi: tuple[float, float]
    waves: tuple[tuple[int, float, float], ...]
    goblet: float
    epithelium_um: float


class Gland(NamedTuple):
    """A gland of the slide: its centre in um, its shape, and whether that is mirrored."""

    x: float
    y: float
    shape: Shape
    flip_x: bool
    flip_y: bool


class Layout:
    """The layout of one synthetic slide.

    Args:
        width_um: extent along x.
        height_um: extent along y.
        seed: decides everything.
    """

    def __init__(self, width_um: float, height_um: float, seed: int) -> None:
        self._seed = seed
        rng = np.random.default_rng((seed, 0))
        self._table = rng.random((_TABLE, _TABLE)) * 2 - 1
        self._islands = _islands(width_um, height_um, rng)
        self._small = max(width_um, height_um) < 3000
        self._shapes = _shapes(np.random.default_rng((seed, 1)))
        self._segment = lru_cache(maxsize=4096)(self._fill_segment)

    def inside_um(self, x: Float, y: Float) -> Float:
        """About how far places are inside the tissue, in um; negative on glass."""
        best = np.full(np.broadcast(x, y).shape, -np.inf)
        for cx, cy, a, b in self._islands:
            small = min(a, b)
            away = np.hypot((x - cx) / a, (y - cy) / b)
            best = np.maximum(best, (1 - away) * small + 0.22 * small * self._noise(x, y, small))
        rough = 22 * self._noise(x, y, 110.0) + 5 * self._noise(y, x, 22.0)
        return np.asarray(best + rough)

    def glands(self, x0: float, y0: float, x1: float, y1: float) -> list[Gland]:
        """All glands that may touch the rectangle (halo included), row by row."""
        found: list[Gland] = []
        reach = 75.0 + HALO_UM
        tall = reach + _SWAY_UM
        for band in range(
            math.floor((y0 - tall) / _BAND_UM), math.floor((y1 + tall) / _BAND_UM) + 1
        ):
            for row in range(4):
                shift = self._row_shift(band, row)
                first = math.floor((x0 - reach - shift) / _SEGMENT_UM)
                last = math.floor((x1 + reach - shift) / _SEGMENT_UM)
                for segment in range(first, last + 1):
                    found += [
                        g
                        for g in self._segment(band, row, segment)
                        if x0 - reach < g.x < x1 + reach and y0 - reach < g.y < y1 + reach
                    ]
        return found

    def _row_shift(self, band: int, row: int) -> float:
        return float(self._rng(2, band, row).uniform(0, _SEGMENT_UM))

    def _fill_segment(self, band: int, row: int, segment: int) -> tuple[Gland, ...]:
        kinds = self._rng(3, band).permutation([0, 0, 1, 1])
        top = band * _BAND_UM + sum(_ROW_UM[k] for k in kinds[:row])
        kind = int(kinds[row])
        rng = self._rng(4, band, row, segment)
        chosen: list[Shape] = []
        free = _SEGMENT_UM
        while True:
            shape = self._shapes[kind][int(rng.integers(SHAPES_PER_CLASS))]
            if free < 2 * shape.semi[0] + _GAP_UM:
                break
            free -= 2 * shape.semi[0] + _GAP_UM
            chosen.append(shape)
        spare = free / len(chosen)
        x = segment * _SEGMENT_UM + self._row_shift(band, row)
        glands = []
        for shape in chosen:
            a, b = shape.semi
            slack = max(0.0, _ROW_UM[kind] - _GAP_UM - 2 * b) / 2
            y = top + _ROW_UM[kind] / 2 + rng.uniform(-slack, slack)
            centre = x + a + _GAP_UM / 2 + spare * rng.uniform(0.1, 0.9)
            y += _SWAY_UM * float(self._noise(np.array(centre), np.array(0.0), 1000.0))
            flips = rng.random(2) < 0.5
            gland = Gland(centre, y, shape, bool(flips[0]), bool(flips[1]))
            if rng.random() < 0.94 and self._fits(gland):
                glands.append(gland)
            x += 2 * a + _GAP_UM + spare
        return tuple(glands)

    def _fits(self, gland: Gland) -> bool:
        """Whether the gland lies in tissue, away from its edge, and, on a slide of more than
        3 mm, where glands grow."""
        a, b = gland.shape.semi
        x = gland.x + np.array([0, a, -a, 0, 0, 0.7 * a, 0.7 * a, -0.7 * a, -0.7 * a])
        y = gland.y + np.array([0, 0, 0, b, -b, 0.7 * b, -0.7 * b, 0.7 * b, -0.7 * b])
        if self.inside_um(x, y).min() < (_EDGE_UM / 3 if self._small else _EDGE_UM):
            return False
        if self._small:
            return True
        place = np.array([gland.x]), np.array([gland.y])
        return bool(self._noise(place[1], place[0], 420.0)[0] > -0.6)

    def _noise(self, x: Float, y: Float, wave_um: float) -> Float:
        """Smooth noise within -1 .. 1 with features of about `wave_um`."""
        u, v = np.asarray(x) / wave_um + 17.3, np.asarray(y) / wave_um + 5.7
        i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
        s, t = u - i, v - j
        s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
        i0, i1, j0, j1 = i % _TABLE, (i + 1) % _TABLE, j % _TABLE, (j + 1) % _TABLE
        upper = self._table[j0, i0] * (1 - s) + self._table[j0, i1] * s
        lower = self._table[j1, i0] * (1 - s) + self._table[j1, i1] * s
        return np.asarray(upper * (1 - t) + lower * t)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *(k + 1_000_000 for k in key)])


def _islands(
    width_um: float, height_um: float, rng: np.random.Generator
) -> list[tuple[float, float, float, float]]:
    """(centre x, centre y, semi-axis x, semi-axis y) of the tissue pieces, in um."""
    columns = max(1, round(width_um / _ISLAND_UM))
    rows = max(1, round(height_um / _ISLAND_UM))
    w, h = width_um / columns, height_um / rows
    single = columns * rows == 1
    islands = []
    for row in range(rows):
        for column in range(columns):
            a, b = rng.uniform(0.40, 0.46, 2) if single else rng.uniform(0.30, 0.44, 2)
            dx, dy = rng.uniform(-0.03, 0.03, 2)
            present = rng.random() < 0.75 or (row == 0 and column == 0)
            if present:
                islands.append(
                    ((column + 0.5 + dx) * w, (row + 0.5 + dy) * h, float(a * w), float(b * h))
                )
    return islands


def _shapes(rng: np.random.Generator) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The gland outlines of a slide: those of low rows and those of high rows."""
    classes = []
    for kind, (low, high) in enumerate(((29.0, 40.0), (42.0, 60.0))):
        shapes = []
        for n in range(SHAPES_PER_CLASS):
            b = rng.uniform(low, high)
            a = min(75.0, b * rng.uniform(0.9, 1.5))
            waves = tuple(
                (k, float(rng.normal(0, 0.11 / k)), float(rng.uniform(0, 2 * math.pi)))
                for k in (2, 3, 4, 5)
            )
            goblet = 0.0 if n % 3 == 2 else float(rng.uniform(0.8, 1.0))
            share = rng.uniform(0.42, 0.55) if goblet == 0 else rng.uniform(0.56, 0.70)
            number = kind * SHAPES_PER_CLASS + n
            epithelium = min(30.0, float(share * b))
            shapes.append(Shape(number, (float(a), float(b)), waves, goblet, epithelium))
        classes.append(tuple(shapes))
    return classes[0], classes[1]
