"""How objects are made of a class map: specks and holes removed, touching objects parted.

Knows no networks and no files. What `ObjectsConfig` says belongs to a model: it is chosen together
with its weights and kept in its checkpoint. `clean_labels` and `separate` do it for an image in
memory; what `cleanings` and `parting` give does the same for one that comes band by band, with the
same result to the pixel for any height of the bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.cleaning import Cleaning
from wsiseg.errors import ConfigError
from wsiseg.parting import Parting

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

_MAX_REACH_UM = 500.0
"""A band of a slide is held with so much above and below it; objects are smaller than that."""


@dataclass(frozen=True)
class ObjectsConfig:
    """Post-processing of the labels of a model. The defaults change nothing."""

    min_area_um2: float = 0.0
    """Regions of a class that is not background below this area get the label around them."""
    max_hole_um2: float = 0.0
    """Regions of background classes below this area get the label around them, unless they are
    cut by the edge of the image or of the tissue."""
    border_threshold: float = 0.5
    """Pixels with this probability of a border or more are no core of an object."""
    min_core_um2: float = 0.0
    """Cores below this area make no object of their own."""
    cut_share: float = 1.0
    """Share of `min_area_um2` and of `min_core_um2` that is enough for what the edge of the image
    cuts: more of it lies beyond. Not for what the edge of the tissue cuts."""
    join_um: float = 0.0
    """Neighbours of one class become one where their distinctness is below this: the odds of the
    mean probability of a border between them, times the area of the smaller one, divided by the
    length of what they share, in um. 0 joins none. Goes with a low `border_threshold`."""
    reach_um: float = 10.0
    """How far objects grow from their cores, in steps from pixel to pixel. Pixels farther from
    every core belong as a whole to an object that they touch, or else are an object."""

    def __post_init__(self) -> None:
        for name in ("min_area_um2", "max_hole_um2", "min_core_um2", "reach_um", "join_um"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"objects.{name}: must not be negative")
        if self.reach_um > _MAX_REACH_UM:
            raise ConfigError(f"objects.reach_um: must be at most {_MAX_REACH_UM:g}")
        if not 0 <= self.cut_share <= 1:
            raise ConfigError("objects.cut_share: must be from 0 to 1")
        if not 0 < self.border_threshold <= 1:
            raise ConfigError("objects.border_threshold: must be above 0 and at most 1")


def clean_labels(
    labels: UInt8, *, background: Sequence[int], mpp: float, config: ObjectsConfig
) -> UInt8:
    """Labels without small holes and specks.

    First background regions below `max_hole_um2`, unless they touch the edge of the image or value
    0, then other regions below `min_area_um2` (`cut_share` of it at the edge of the image) take
    over the label around them. In that order the area of a region counts its holes: a small ring
    is not taken apart before it is filled.

    The label around a region is that of the pixel left of its first pixel in reading order, where
    that is 0 or outside the one above, where that is so too the first background class; without
    any, the region stays. A neighbour that goes itself passes on what it gets.

    Args:
        labels: (H, W) uint8 values on disk, 0 = not analysed.
        background: values on disk of the background classes.
        mpp: micrometres per pixel.
        config: the areas.

    Returns:
        (H, W) uint8; 0 exactly where `labels` is.
    """
    for cleaning in cleanings(background, mpp, config):
        cleaning.add(labels)
        cleaning.finish()
        labels = cleaning.apply(0, labels)
    return labels


def separate(
    labels: UInt8,
    border: npt.NDArray[Any] | None,
    *,
    background: Sequence[int],
    mpp: float,
    config: ObjectsConfig,
) -> Int32:
    """The objects of a class map.

    A core is a 4-connected region of one class whose border probability is below
    `border_threshold`, of `min_core_um2` or more (`cut_share` of it at the edge of the image). All
    cores grow at the same speed, pixel by pixel over the sides of pixels of their class, as far as
    `reach_um`; a pixel that several reach at once goes to the first of them. What they do not
    reach, region by region, belongs to the first object that it touches, or is an object of its
    own: a gland too thin for a core stays whole. Then the neighbours of one class that are the
    least distinct become one, and so on while that is below `join_um` (see wsiseg.joining); of two
    pixels side by side the larger probability of a border counts. Every object is 4-connected, and
    every pixel of a class that is not background has one.

    Args:
        labels: (H, W) uint8 values on disk, 0 = not analysed.
        border: (H, W) probability that a pixel lies in the inner border of an object, float 0..1
            or uint8 x 255; None makes one object of each 4-connected region.
        background: values on disk of the background classes.
        mpp: micrometres per pixel.
        config: threshold, areas, reach.

    Returns:
        (H, W) int32, 0 = none, else 1..n in reading order of the first pixels of the cores (of
        the objects themselves where they have none), of joined ones the first.
    """
    work = parting(background, mpp, config)
    work.add_cores(labels, border)
    work.finish_cores()
    grown = work.grow(labels, work.core_numbers(0, labels, border))
    draft = work.add_grown(labels, grown, border)
    work.finish()
    return work.numbers(draft)


def cleanings(background: Sequence[int], mpp: float, config: ObjectsConfig) -> list[Cleaning]:
    """What `clean_labels` does, to be done one after the other: holes, then specks."""
    front = _front(background)
    back = ~front
    back[0] = False
    fallback = min(background, default=0)
    both = (
        Cleaning(back, config.max_hole_um2 / mpp**2, fallback=fallback, spare_cut=True),
        Cleaning(
            front, config.min_area_um2 / mpp**2, fallback=fallback, cut_share=config.cut_share
        ),
    )
    return [c for c in both if c.area_px > 0]


def parting(background: Sequence[int], mpp: float, config: ObjectsConfig) -> Parting:
    """What `separate` does."""
    return Parting(
        _front(background),
        threshold=config.border_threshold,
        min_core_px=config.min_core_um2 / mpp**2,
        cut_share=config.cut_share,
        join_px=config.join_um / mpp,
        reach_px=round(config.reach_um / mpp),
    )


def _front(background: Sequence[int]) -> npt.NDArray[np.bool_]:
    """(256,) which values on disk are of classes that are not background."""
    front = np.ones(256, bool)
    front[[0, *background]] = False
    return front
