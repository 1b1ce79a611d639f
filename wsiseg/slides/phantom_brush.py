"""Paints H&E from a label map: glands, stroma and glass. Knows no slides and no layout.

The picture is mixed as amounts of haematoxylin and eosin and turned into colour by absorption
(Beer-Lambert). Colours, sizes and textures were matched to colon at 20x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Float = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
GLASS, STROMA, GLAND = 0, 1, 2

_WHITE = np.array([248, 244, 248], np.float32)
_HAEMATOXYLIN = np.array([0.90, 1.65, 0.56], np.float32)
_EOSIN = np.array([0.115, 0.84, 0.23], np.float32)


@dataclass(frozen=True)
class Style:
    """How the glands of a picture look.

    Attributes:
        goblet: share of goblet cells, 0 (none, crowded nuclei in layers) .. 1 (one basal row).
        epithelium_um: height of the epithelium; what is deeper in a gland is lumen.
    """

    goblet: float = 1.0
    epithelium_um: float = 24.0


class _Canvas:
    """Stain amounts while they are painted, with the measures that all brushes need."""

    def __init__(
        self, labels: UInt8, *, mpp: float, rng: np.random.Generator, wrap: bool = False
    ) -> None:
        self.labels = labels
        self.shape = labels.shape
        self.per_um = 1 / mpp
        self.rng = rng
        self.mode = "wrap" if wrap else "reflect"
        self.wrap = wrap
        self.h = np.zeros(self.shape, np.float32)
        self.e = np.zeros(self.shape, np.float32)

    def noise(self, sigma_um: float) -> Float:
        """Smooth noise of unit variance with features of about `sigma_um`.

        Coarse noise is made on a coarser lattice and interpolated.
        """
        sigma = sigma_um * self.per_um
        step = 2 ** max(0, int(math.log2(max(1.0, sigma / 2))))
        coarse = tuple(-(-n // step) for n in self.shape)
        white = self.rng.standard_normal(coarse, np.float32)
        smooth = ndimage.gaussian_filter(white, sigma / step, mode=self.mode, truncate=3)
        smooth /= smooth.std()
        if step > 1:
            mode = "grid-wrap" if self.wrap else "nearest"
            smooth = ndimage.zoom(smooth, step, order=1, mode=mode, grid_mode=True)
        return np.asarray(smooth[: self.shape[0], : self.shape[1]], np.float32)

    def depth_um(self, inside: npt.NDArray[np.bool_]) -> Float:
        """Distance in um of every pixel of `inside` to its border; 0 outside."""
        distance = ndimage.distance_transform_edt(inside) / self.per_um
        return np.asarray(distance, np.float32)

    def scatter(self, where: npt.NDArray[np.bool_], *, spacing_um: float) -> list[tuple[int, int]]:
        """Random (y, x) within `where`, no two closer than `spacing_um`."""
        radius = max(1, round(spacing_um * self.per_um))
        inside = np.flatnonzero(where)
        tries = min(len(inside), 20 + 12 * len(inside) // radius**2)
        picked = self.rng.choice(inside, tries, replace=False, shuffle=True)
        places = np.stack(np.unravel_index(picked, self.shape), axis=1)
        taken = np.zeros((self.shape[0] + 2 * radius, self.shape[1] + 2 * radius), bool)
        yy, xx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        disc = yy * yy + xx * xx < radius * radius
        chosen: list[tuple[int, int]] = []
        for y, x in places.tolist():
            if not taken[y + radius, x + radius]:
                chosen.append((y, x))
                taken[y : y + 2 * radius + 1, x : x + 2 * radius + 1] |= disc
        return chosen

    def ellipse(
        self, y: float, x: float, *, semi_um: tuple[float, float], angle: float
    ) -> tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], Float]:
        """The pixels around an ellipse as an index, and their elliptical radius (1 = rim)."""
        a, b = (max(0.8, s * self.per_um) for s in semi_um)
        reach = math.ceil(1.5 * max(a, b)) + 1
        rows = np.arange(math.floor(y) - reach, math.floor(y) + reach + 1)
        columns = np.arange(math.floor(x) - reach, math.floor(x) + reach + 1)
        if not self.wrap:
            rows = rows[(rows >= 0) & (rows < self.shape[0])]
            columns = columns[(columns >= 0) & (columns < self.shape[1])]
        dy, dx = rows[:, None] - y, columns[None, :] - x
        u = (dx * math.cos(angle) + dy * math.sin(angle)) / a
        v = (-dx * math.sin(angle) + dy * math.cos(angle)) / b
        index = np.ix_(rows % self.shape[0], columns % self.shape[1])
        return index, np.sqrt(u * u + v * v).astype(np.float32)


def paint(
    labels: UInt8,
    *,
    mpp: float,
    rng: np.random.Generator,
    style: Style | None = None,
    wrap: bool = False,
) -> UInt8:
    """An H&E picture of a label map.

    Args:
        labels: (h, w) uint8, 0 glass, 1 stroma, 2 gland (epithelium with its lumen).
        mpp: micrometres per pixel.
        rng: decides every detail.
        style: how the glands look.
        wrap: whether opposite edges fit together (for a texture that is repeated).

    Returns:
        (h, w, 3) uint8 RGB.
    """
    canvas = _Canvas(labels, mpp=mpp, rng=rng, wrap=wrap)
    gland = labels == GLAND
    outside_um = canvas.depth_um(~gland) if gland.any() else None
    _stroma(canvas, labels == STROMA, outside_um)
    if gland.any():
        _glands(canvas, gland, style or Style())
    return _develop(canvas)


def _stroma(canvas: _Canvas, where: npt.NDArray[np.bool_], outside_um: Float | None) -> None:
    """Fibres along smooth curves (around glands where there are any), gaps, cells."""
    if not where.any():
        return
    height = canvas.shape[0]
    phase = canvas.noise(28) * 16 * canvas.per_um
    if outside_um is None:
        phase = phase + np.arange(height, dtype=np.float32)[:, None]
    else:
        phase = phase * 0.25 + outside_um * canvas.per_um
    fibre = _lines(canvas, phase, 1.3) * (0.6 + 0.5 * canvas.noise(6))
    eosin = 0.72 + 0.22 * fibre + 0.12 * canvas.noise(14) + 0.20 * canvas.noise(1.2)
    eosin += 0.16 * _lines(canvas, phase, 0.5) * canvas.noise(4)
    gap = _step(0.8 * canvas.noise(2.2) - 0.5 * fibre + 0.7 * canvas.noise(18), 0.7, 0.4)
    eosin *= 1 - 0.88 * gap
    if outside_um is not None:
        cleft = _step(canvas.noise(9), 0.55, 0.3) * np.exp(-(((outside_um - 3.2) / 1.8) ** 2))
        eosin *= 1 - 0.85 * cleft
        eosin += 0.30 * np.exp(-((outside_um / 1.3) ** 2))
    canvas.e[where] = np.clip(eosin, 0.03, 1.7)[where]
    canvas.h[where] = np.clip(0.035 + 0.02 * canvas.noise(5), 0, 1)[where]
    _stroma_cells(canvas, where, phase, outside_um)


def _stroma_cells(
    canvas: _Canvas, where: npt.NDArray[np.bool_], phase: Float, outside_um: Float | None
) -> None:
    """Spindle nuclei along the fibres, lymphocytes and plasma cells in loose groups."""
    gy, gx = np.gradient(ndimage.gaussian_filter(phase, 2 * canvas.per_um, mode=canvas.mode))
    along = np.arctan2(gx, -gy)
    crowd = canvas.noise(30)
    allowed = where if outside_um is None else where & (outside_um > 2.5)
    rng = canvas.rng
    for y, x in canvas.scatter(allowed, spacing_um=7.4):
        kind = rng.random()
        if kind > 0.64 + 0.2 * crowd[y, x]:
            continue
        angle = float(along[y, x]) + rng.normal(0, 0.25)
        if kind < 0.32 - 0.12 * crowd[y, x]:
            semi = rng.uniform(3.2, 7.0), rng.uniform(1.0, 1.9)
            _nucleus(canvas, y, x, semi_um=semi, angle=angle, amount=rng.uniform(0.75, 1.1))
            continue
        size = rng.uniform(2.0, 3.3)
        index, radius = canvas.ellipse(y, x, semi_um=(size * 1.6, size * 1.4), angle=angle)
        body = _step(radius, 1.0, -0.2) * rng.uniform(0.2, 1)
        canvas.e[index] += 0.35 * body * (0.9 - canvas.e[index])
        canvas.h[index] = np.maximum(canvas.h[index], 0.16 * body)
        semi = size * rng.uniform(1, 1.25), size * rng.uniform(0.75, 1)
        _nucleus(canvas, y, x, semi_um=semi, angle=angle, amount=rng.uniform(0.9, 1.3))


def _glands(canvas: _Canvas, gland: npt.NDArray[np.bool_], style: Style) -> None:
    """Epithelium with basal nuclei around a lumen."""
    distance, nearest = ndimage.distance_transform_edt(gland, return_indices=True)
    depth = np.asarray(distance / canvas.per_um, np.float32)
    streak = canvas.noise(1.1)[nearest[0], nearest[1]]
    height = style.epithelium_um * (1 + 0.02 * streak + 0.09 * canvas.noise(8))
    apical = np.clip(depth / height, 0, 1)
    eosin = 1.25 - 0.3 * apical + 0.08 * streak + 0.11 * canvas.noise(1.2)
    blue = 0.28 - 0.16 * apical + 0.04 * canvas.noise(2)
    lumen = _step(depth - height, 0.0, 0.9)
    mucin = np.clip(0.05 + 0.05 * canvas.noise(1.5) + 0.06 * canvas.noise(10), 0.0, 0.5)
    canvas.e[gland] = (eosin * (1 - lumen) + mucin * lumen)[gland]
    canvas.h[gland] = (blue * (1 - lumen) + 0.25 * mucin * lumen)[gland]
    smooth = ndimage.gaussian_filter(depth, 2.5 * canvas.per_um)
    gy, gx = np.gradient(smooth)
    inward = np.arctan2(gy, gx)
    if style.goblet > 0:
        _goblets(canvas, gland, depth / style.epithelium_um, inward, style)
    _basal_nuclei(canvas, gland, depth, inward, style)


def _goblets(
    canvas: _Canvas, gland: npt.NDArray[np.bool_], apical: Float, inward: Float, style: Style
) -> None:
    """Pale vacuoles between the nuclei and the lumen."""
    rng = canvas.rng
    for y, x in canvas.scatter(gland & (apical > 0.46) & (apical < 0.92), spacing_um=8.8):
        if rng.random() > style.goblet:
            continue
        semi = rng.uniform(5.0, 8.4), rng.uniform(4.0, 6.0)
        index, radius = canvas.ellipse(y, x, semi_um=semi, angle=float(inward[y, x]))
        pale = _step(radius, 1.0, -0.12) * rng.uniform(0.75, 1.0)
        canvas.e[index] += pale * (0.20 - canvas.e[index])
        canvas.h[index] += pale * (0.045 - canvas.h[index])
        rim = np.exp(-(((radius - 1.05) / 0.12) ** 2)) * 0.10
        canvas.e[index] += rim


def _basal_nuclei(
    canvas: _Canvas, gland: npt.NDArray[np.bool_], depth: Float, inward: Float, style: Style
) -> None:
    """Elongated nuclei that stand side by side on the base, in layers where there is no goblet."""
    rng = canvas.rng
    crowded = style.goblet < 0.3
    low, high = (4.0, 0.62 * style.epithelium_um) if crowded else (2.8, 5.8)
    spacing = 5.2 if crowded else 3.9
    for y, x in canvas.scatter(gland & (depth > low) & (depth < high), spacing_um=spacing):
        semi = (
            (rng.uniform(4.4, 6.0), rng.uniform(2.3, 3.0))
            if crowded
            else (rng.uniform(2.9, 5.0), rng.uniform(1.7, 2.6))
        )
        angle = float(inward[y, x]) + rng.normal(0, 0.28)
        amount = rng.uniform(0.6, 1.1) if crowded else rng.uniform(0.9, 1.3)
        _nucleus(canvas, y, x, semi_um=semi, angle=angle, amount=amount)


def _nucleus(
    canvas: _Canvas,
    y: float,
    x: float,
    *,
    semi_um: tuple[float, float],
    angle: float,
    amount: float,
) -> None:
    """A nucleus: soft edge, darker rim, mottled chromatin."""
    index, radius = canvas.ellipse(y, x, semi_um=semi_um, angle=angle)
    bumps = canvas.rng.standard_normal(radius.shape, np.float32)
    sigma = 1.1 * canvas.per_um
    radius = radius + 0.45 * sigma * ndimage.gaussian_filter(bumps, sigma)
    mottle = canvas.rng.standard_normal(radius.shape, np.float32)
    mottle = ndimage.gaussian_filter(mottle, 0.5 * canvas.per_um) * canvas.per_um
    inside = _step(radius, 1.0, -0.13)
    texture = 0.78 + 0.24 * np.clip(radius, 0, 1) ** 3 + 0.28 * mottle
    blue = amount * inside * np.clip(texture, 0.3, 1.5)
    canvas.h[index] = np.maximum(canvas.h[index] * (1 - 0.75 * inside), blue)
    canvas.e[index] += inside * (0.42 - canvas.e[index]) * 0.7


def _develop(canvas: _Canvas) -> UInt8:
    """Stain amounts to RGB: absorption, the blur of the optics and the noise of the sensor."""
    density = canvas.h[..., None] * _HAEMATOXYLIN + canvas.e[..., None] * _EOSIN
    light = _WHITE * np.exp(-density)
    sigma = 0.30 * canvas.per_um
    light = ndimage.gaussian_filter(light, (sigma, sigma, 0), mode=canvas.mode)
    grain = canvas.rng.standard_normal((*canvas.shape, 3), np.float32)
    grain = ndimage.gaussian_filter(grain, (0.5, 0.5, 0), mode=canvas.mode)
    light += 3.2 * grain
    return np.asarray(np.clip(light + 0.5, 0, 255), np.uint8)


def _lines(canvas: _Canvas, phase: Float, sigma_um: float) -> Float:
    """Unit noise that is constant along the level curves of `phase` (pixels)."""
    period = canvas.shape[0]
    line = canvas.rng.standard_normal(period)
    line = ndimage.gaussian_filter1d(line, sigma_um * canvas.per_um, mode="wrap")
    line /= line.std()
    base = np.floor(phase).astype(np.int64)
    part = phase - base
    value = line[base % period] * (1 - part) + line[(base + 1) % period] * part
    return np.asarray(value, np.float32)


def _step(value: npt.NDArray[np.floating], threshold: float, width: float) -> Float:
    """0 below the threshold, 1 above (the reverse for a negative width), smooth over `width`."""
    scaled = np.clip((value - threshold) / width, -30, 30)
    return np.asarray(1 / (1 + np.exp(-2 * scaled)), np.float32)
