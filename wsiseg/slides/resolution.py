"""Micrometres per pixel of a slide: where they come from and what is refused. Reads no pixels."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from wsiseg.errors import ResolutionError

_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
_PLAUSIBLE_UM = (0.05, 10.0)
_UM_PER_OME_UNIT = {
    "Å": 1e-4,
    "nm": 1e-3,
    "\N{GREEK SMALL LETTER MU}m": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25_400.0,
}
"""Normalised: there are two letters for micro, and two for angstrom."""
_MAX_DIFFERENCE = 0.05
_TAG_VENDORS = ("generic-tiff", "image")


@dataclass(frozen=True)
class Resolution:
    """Micrometres per level-0 pixel.

    Attributes:
        mpp: the value.
        source: "option", "properties", "tiff resolution" or "objective power".
        warnings: what a user should know about it.
    """

    mpp: float
    source: str
    warnings: tuple[str, ...] = ()


def resolve(
    name: str, properties: Mapping[str, str], *, vendor: str, option: float | None
) -> Resolution:
    """The resolution of a slide.

    The first of these that is there: the caller's `option`; the properties `openslide.mpp-x/y` or
    `tiffslide.mpp-x/y`, or the physical pixel size of an OME-TIFF; TIFF resolution tags in inch or
    cm between 0.05 and 10 um per pixel (the 72 to 600 dpi that many programs write are of print, no
    physical scale); 10 um / objective power, with a warning.

    An option that differs by more than 5% from what the slide states is taken, with a warning.

    Raises:
        ResolutionError: the option is out of range, nothing is known, or x and y differ by more
            than 1%.
    """
    if option is None:
        return _stated(name, properties, vendor)
    mpp = checked_mpp(option)
    try:
        stated = _stated(name, properties, vendor)
    except ResolutionError:
        return Resolution(mpp, "option")
    if abs(stated.mpp - mpp) <= _MAX_DIFFERENCE * stated.mpp:
        return Resolution(mpp, "option")
    warning = f"states {stated.mpp:.4g} um per pixel ({stated.source}), {mpp:.4g} is used as given"
    return Resolution(mpp, "option", (warning,))


def _stated(name: str, properties: Mapping[str, str], vendor: str) -> Resolution:
    """What a slide states, see `resolve`."""
    pair = _mpp_ome(properties)
    if pair is None and vendor not in _TAG_VENDORS:
        pair = _mpp_properties(properties)
    if pair is not None:
        return Resolution(_isotropic(name, *pair), "properties")
    pair = _mpp_tags(properties)
    if pair is not None:
        return Resolution(_isotropic(name, *pair), "tiff resolution")
    power = objective_power(properties)
    if power is not None:
        mpp = 10 / power
        warning = f"mpp {mpp:g} is a guess from the objective power {power:g}; --mpp sets it"
        return Resolution(mpp, "objective power", (warning,))
    raise ResolutionError(
        f"{name}: the slide does not state its micrometres per pixel; give them with --mpp, or for"
        " some of many slides in a .csv with the columns path and mpp"
    )


def checked_mpp(mpp: float) -> float:
    """`mpp` itself where it is finite and within 0.01 .. 1000.

    Raises:
        ResolutionError: it is not.
    """
    if not (math.isfinite(mpp) and 0.01 <= mpp <= 1000):
        raise ResolutionError(f"mpp must be between 0.01 and 1000 micrometres per pixel, not {mpp}")
    return float(mpp)


def objective_power(properties: Mapping[str, str]) -> float | None:
    """The objective's magnification where it is stated and positive."""
    for key in ("openslide.objective-power", "tiffslide.objective-power"):
        power = _positive(properties.get(key))
        if power is not None:
            return power
    return None


def _mpp_ome(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """The physical pixel size of the first image of an OME-XML description (schema 2016-06)."""
    text = properties.get("tiff.ImageDescription", "")
    if "<OME" not in text[:2000]:
        return None
    try:
        pixels = ElementTree.fromstring(text.encode()).find(".//{*}Pixels")
    except (ElementTree.ParseError, LookupError, ValueError):  # the latter two: of its encoding
        return None
    pair = []
    for axis in "XY":
        size = None if pixels is None else _positive(pixels.get(f"PhysicalSize{axis}"))
        unit = "um" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "um")
        unit = unicodedata.normalize("NFKC", unit)
        if size is None or unit not in _UM_PER_OME_UNIT:
            return None
        pair.append(size * _UM_PER_OME_UNIT[unit])
    return pair[0], pair[1]


def _mpp_properties(properties: Mapping[str, str]) -> tuple[float, float] | None:
    for prefix in ("openslide", "tiffslide"):
        x = _positive(properties.get(f"{prefix}.mpp-x"))
        y = _positive(properties.get(f"{prefix}.mpp-y"))
        if x is not None and y is not None:
            return x, y
    return None


def _mpp_tags(properties: Mapping[str, str]) -> tuple[float, float] | None:
    unit = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
    x = _positive(properties.get("tiff.XResolution"))
    y = _positive(properties.get("tiff.YResolution"))
    if unit is None or x is None or y is None:
        return None
    pair = unit / x, unit / y
    low, high = _PLAUSIBLE_UM
    return pair if all(low <= mpp <= high for mpp in pair) else None


def _isotropic(name: str, x: float, y: float) -> float:
    if abs(x - y) > 0.01 * min(x, y):
        raise ResolutionError(
            f"{name}: pixels are not square ({x:g} x {y:g} um); resample the slide, or give one "
            "value with --mpp to treat them as square"
        )
    return (x + y) / 2


def _positive(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
