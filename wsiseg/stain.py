"""Stains of an H&E picture, and one colouring made like another's. Knows no files, slides, models.

Source: Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI
2009. Optical density is -ln((value + 1) / 256) of each channel, 0 for white. Normalising is one
linear map of it, the same for all pixels of a slide, so that tiles are mapped one by one without
seams. What is neither haematoxylin nor eosin (pigment, the third axis) keeps its density.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.config import from_mapping
from wsiseg.errors import ConfigError, DatasetError

Float = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
Vector = tuple[float, float, float]

DENSITY = -np.log((np.arange(256) + 1) / 256)
"""Optical density of each channel value."""
STAINED_DENSITY = 0.15
"""Mean optical density of a pixel from which on it counts as stained."""
_GREY = 0.2
_GREEN = 0.85
_DARK = 25
_LEAST_PX = 1000
_MOST_PX = 400_000
_PERCENT = 1.0
_LEAST_ANGLE = math.radians(8)
_PRIOR = 0.06
_USUAL = np.array([(0.60, 0.74, 0.30), (0.09, 0.93, 0.35)])
_USUAL_ANGLE = math.radians(25)
_GAIN = 3.0
_CHUNK_PX = 1 << 16


@dataclass(frozen=True)
class StainBasis:
    """The two stains of a picture."""

    vectors: tuple[Vector, Vector]
    """Optical density in (R, G, B) of haematoxylin and of eosin, each of length 1."""
    maxima: tuple[float, float]
    """How much there is of each where there is much: the 99th percentile, in optical density."""

    def __post_init__(self) -> None:
        vectors = np.array(self.vectors, np.float64)
        lengths = np.linalg.norm(vectors, axis=1)
        if not (np.isfinite(vectors).all() and np.abs(lengths - 1).max() < 1e-3):
            raise ConfigError("stain vectors: must be two unit vectors of optical density")
        if not np.linalg.norm(np.cross(*vectors)) > 0.01:
            raise ConfigError("stain vectors: must differ in direction")
        if not all(math.isfinite(m) and m > 0 for m in self.maxima):
            raise ConfigError(f"stain maxima {list(self.maxima)}: must be above 0")


def read_basis(data: Any) -> StainBasis | None:
    """The stains that a configuration gives: None, StainBasis or its mapping.

    Raises:
        ConfigError: anything else.
    """
    if data is None or isinstance(data, StainBasis):
        return data
    return from_mapping(StainBasis, data, "stain_target")


def stained(pixels: UInt8) -> npt.NDArray[np.bool_]:
    """Which pixels (..., 3) uint8 bear haematoxylin or eosin, which both absorb green most.

    Not glass, grey or black; nor ink, blood or pigment, which absorb more red or blue.
    """
    density = DENSITY.astype(np.float32)[pixels]
    mean = density.mean(-1)
    spread = density.max(-1) - density.min(-1)
    green = density[..., 1]
    tinged = (spread > _GREY * mean) & (pixels.max(-1) > _DARK)
    own = (green > _GREEN * density[..., 0]) & (green > density[..., 2])
    return np.asarray((mean > STAINED_DENSITY) & tinged & own, bool)


def thinned(pixels: UInt8, most: int) -> UInt8:
    """At most `most` of the pixels (N, 3), evenly spread and always the same ones."""
    if len(pixels) <= most:
        return pixels
    return pixels[np.arange(most, dtype=np.int64) * len(pixels) // most]


def estimate_stains(pixels: UInt8) -> StainBasis | None:
    """The stains of a picture after Macenko: extreme directions of the plane of its densities.

    The plane is that of the two largest singular vectors of the densities of stained pixels; the
    stains are its robust extremes, the 1st and 99th percentile of the angle. Of the two,
    haematoxylin is the one that absorbs more red. Beyond the paper: where one stain prevails and
    the second vector would be noise, it is drawn to the red axis, along which the stains differ.

    Args:
        pixels: (N, 3) or (H, W, 3) uint8 RGB; what is not tissue may be among them.

    Returns:
        The stains, or None where they cannot be told: fewer than 1000 stained pixels, all of one
        colour (directions within 8 degrees), or colours over 25 degrees from usual H&E (other
        stains, tinted glass).
    """
    flat = thinned(pixels.reshape(-1, 3), _MOST_PX)
    density = DENSITY[flat[stained(flat)]]
    if len(density) < _LEAST_PX:
        return None
    plane = _plane(density)
    along = density @ plane
    angles = np.percentile(np.arctan2(along[:, 1], along[:, 0]), (_PERCENT, 100 - _PERCENT))
    if angles[1] - angles[0] < _LEAST_ANGLE:
        return None
    ends = np.clip([plane @ (np.cos(a), np.sin(a)) for a in angles[::-1]], 1e-6, None)
    vectors = ends / np.linalg.norm(ends, axis=1, keepdims=True)
    usual = _USUAL / np.linalg.norm(_USUAL, axis=1, keepdims=True)
    if (vectors * usual).sum(1).min() < math.cos(_USUAL_ANGLE):
        return None
    amounts = density @ np.linalg.pinv(vectors)
    maxima = np.maximum(np.percentile(amounts, 99, axis=0), 1e-3)
    return _basis(vectors, maxima)


def target_of(images: Iterable[UInt8]) -> StainBasis:
    """The median stains of some images, for normalising others to.

    Args:
        images: (H, W, 3) uint8 RGB, one at a time.

    Raises:
        DatasetError: the stains of none of them can be told.
    """
    found = [basis for basis in map(estimate_stains, images) if basis is not None]
    if not found:
        raise DatasetError(
            "no image has enough stained tissue in two colours to normalise to; train without "
            "stain normalisation"
        )
    vectors = np.median([basis.vectors for basis in found], axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return _basis(vectors, np.median([basis.maxima for basis in found], axis=0))


def normalising_matrix(source: StainBasis, target: StainBasis) -> Float:
    """(3, 3) float64: the map of optical densities (as columns) from one colouring to another.

    Each stain of the source becomes that of the target, times the ratio of their maxima, kept
    from 1/3 to 3 so that a nearly unstained picture does not become noise; the direction that is
    in neither stain keeps its density. Rounded to 6 decimals, so that what a record holds is what
    was done.
    """
    gains = np.divide(target.maxima, source.maxima).clip(1 / _GAIN, _GAIN)
    to = np.array(_with_third(target)) * np.array([*gains, 1.0])[:, None]
    return np.asarray(np.round(np.linalg.solve(_with_third(source), to).T, 6))


def apply_matrix(image: UInt8, matrix: Float) -> UInt8:
    """An image (..., 3) uint8 with its optical densities mapped by a (3, 3) matrix.

    A pixel's result depends on that pixel alone. White stays white.
    """
    # exp(-(M d)) is a product of three factors, each of which depends on one channel's value
    factors = np.exp(-DENSITY[:, None, None] * matrix.T[None])
    flat = image.reshape(-1, 3)
    result = np.empty(flat.shape, np.uint8)
    for first in range(0, len(flat), _CHUNK_PX):
        part = flat[first : first + _CHUNK_PX]
        light = factors[:, 0].take(part[:, 0], axis=0)
        light *= factors[:, 1].take(part[:, 1], axis=0)
        light *= factors[:, 2].take(part[:, 2], axis=0)
        light *= 256
        light -= 0.5  # value = 256 * light - 1, rounded
        result[first : first + _CHUNK_PX] = light.clip(0, 255, out=light)
    return result.reshape(image.shape)


def normalise_image(image: UInt8, target: StainBasis) -> UInt8:
    """An image (H, W, 3) uint8 in the colours of `target`, by its own stains.

    An image whose stains cannot be told (see `estimate_stains`) is given back as it is.
    """
    source = estimate_stains(image)
    return image if source is None else apply_matrix(image, normalising_matrix(source, target))


def _plane(density: Float) -> Float:
    """(3, 2): the main direction of densities (N, 3), and the second, towards more red."""
    moments = density.T @ density / len(density)
    values, axes = np.linalg.eigh(moments)
    main = axes[:, 2] * (np.sign(axes[:, 2].sum()) or 1.0)
    red = np.array([1.0, 0.0, 0.0]) - main[0] * main
    red /= max(float(np.linalg.norm(red)), 1e-9)
    moments += values[2] * _PRIOR**2 * np.outer(red, red)
    second = np.linalg.eigh(moments)[1][:, 1]
    return np.stack([main, second * (np.sign(second @ red) or 1.0)], axis=1)


def _basis(vectors: Float, maxima: Float) -> StainBasis:
    h, e = ((float(r), float(g), float(b)) for r, g, b in vectors.round(6))
    return StainBasis((h, e), (round(float(maxima[0]), 6), round(float(maxima[1]), 6)))


def _with_third(basis: StainBasis) -> Float:
    """(3, 3): haematoxylin, eosin and the unit vector across both, a row each."""
    first, second = np.array(basis.vectors)
    across = np.cross(first, second)
    return np.stack([first, second, across / np.linalg.norm(across)])
