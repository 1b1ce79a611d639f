"""Pen marks and black borders in a small picture of a slide. Knows no tissue but by its colour."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

OBJECT_UM2 = 10_000.0
"""The smallest piece of tissue."""
_REST_UM2 = 50_000.0
_COLOURED = 0.10


def find_ink(rgb: UInt8, mpp: float) -> Bool:
    """Pen marks and black borders: strong cores, grown into their fainter rims.

    A colour that more than 40% of all coloured pixels have may be the stain (`_is_stain`).
    """
    hue, saturation, value = _hsv(rgb)
    red = (hue > 352) | (hue < 15)
    green = (hue > 70) & (hue < 185)
    blue = (hue >= 185) & (hue < 250)
    black = (value < 0.27, (value < 0.55) & (saturation < 0.25))
    cores = (
        (green, green & (saturation > 0.22), green & (saturation > 0.06)),
        (blue, blue & (saturation > 0.50), blue & (saturation > 0.10)),
        (red, red & (saturation > 0.75), red & (saturation > 0.45)),
        (black[1], *black),
    )
    ink = np.zeros(hue.shape, bool)
    coloured = (saturation > _COLOURED) & (value >= 0.27)
    coloured_px = np.count_nonzero(coloured)
    for number, (own, core, rim) in enumerate(cores):
        if np.count_nonzero(core & (value >= 0.27)) > 0.4 * coloured_px:
            others = [c | r for k, (_, c, r) in enumerate(cores) if k != number]
            if _is_stain(core, own, coloured & ~np.logical_or.reduce([own, *others]), mpp):
                continue
        core = without_small(core, max(4.0, 2000 / mpp**2))
        if core.any():
            ink |= ndimage.binary_propagation(core, mask=core | rim)
    return ndimage.binary_dilation(ink, iterations=2) if ink.any() else ink


def _is_stain(core: Bool, own: Bool, unlike: Bool, mpp: float) -> bool:
    """Whether the colour of most of a picture is that of the tissue: other tissue is absent or
    among it. A thick ring of a pen around a biopsy lies by itself; so would a piece of one stain
    beside a piece of another.

    Args:
        core: (h, w) bool, pixels of the colour.
        own: all pixels of its hue.
        unlike: coloured pixels of another hue, and of no other ink.
        mpp: micrometres per pixel.
    """
    rest = without_small(unlike, OBJECT_UM2 / mpp**2)
    if np.count_nonzero(rest) < max(_REST_UM2 / mpp**2, 0.05 * np.count_nonzero(core)):
        return True
    around = ndimage.binary_dilation(core, iterations=3) & ~own
    beside = np.count_nonzero(around & ndimage.binary_dilation(rest, iterations=2))
    return bool(beside > 0.25 * np.count_nonzero(around))


def _hsv(rgb: UInt8) -> tuple[Float, Float, Float]:
    """Hue in degrees, saturation and value in 0 .. 1, of smoothed pixels."""
    smooth = ndimage.uniform_filter(rgb.astype(np.float32) / 255, (3, 3, 1))
    r, g, b = smooth[..., 0], smooth[..., 1], smooth[..., 2]
    high, low = smooth.max(-1), smooth.min(-1)
    span = np.maximum(high - low, 1e-6)
    hue = np.where(
        high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)
    )
    saturation = (high - low) / np.maximum(high, 1e-6)
    return np.asarray(60 * hue, np.float32), saturation, high


def without_small(mask: Bool, least_px: float) -> Bool:
    """The mask without its connected parts below a number of pixels."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    keep = sizes >= least_px
    keep[0] = False
    return np.asarray(keep[parts])
