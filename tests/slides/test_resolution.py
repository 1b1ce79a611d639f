"""Where mpp comes from, and what is refused."""

from __future__ import annotations

import math

import pytest

from wsiseg.errors import ResolutionError
from wsiseg.slides.resolution import resolve

STATED = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.2501"}
TAGS = {
    "tiff.XResolution": "20000",
    "tiff.YResolution": "20000",
    "tiff.ResolutionUnit": "centimeter",
}
POWER = {"openslide.objective-power": "40"}


def test_order_of_sources() -> None:
    everything = STATED | TAGS | POWER
    assert resolve("s", everything, vendor="aperio", option=0.3).source == "option"
    stated = resolve("s", everything, vendor="aperio", option=None)
    assert (stated.source, stated.warnings) == ("properties", ())
    assert stated.mpp == pytest.approx(0.25005)
    tags = resolve("s", TAGS | POWER, vendor="aperio", option=None)
    assert (tags.mpp, tags.source) == (0.5, "tiff resolution")
    power = resolve("s", POWER, vendor="aperio", option=None)
    assert (power.mpp, power.source) == (0.25, "objective power")
    assert "--mpp" in power.warnings[0]


def test_an_option_that_is_not_what_the_slide_states_is_warned_of() -> None:
    for option in (0.2500, 0.26):
        assert resolve("s", STATED, vendor="aperio", option=option).warnings == ()
    found = resolve("s", STATED, vendor="aperio", option=0.5)
    assert found.mpp == 0.5
    assert found.warnings == ("states 0.25 um per pixel (properties), 0.5 is used as given",)
    assert resolve("s", {}, vendor="aperio", option=0.5).warnings == ()


def test_tiffslide_names_are_read() -> None:
    properties = {"tiffslide.mpp-x": "0.5", "tiffslide.mpp-y": "0.5"}
    assert resolve("s", properties, vendor="aperio", option=None).mpp == 0.5


@pytest.mark.parametrize(
    ("size", "unit", "mpp"),
    [
        ("0.5", None, 0.5),
        ("250", "nm", 0.25),
        ("0.5", "\N{GREEK SMALL LETTER MU}m", 0.5),
        ("0.5", "\N{MICRO SIGN}m", 0.5),
        ("0.5", "micron", 0.5),
        ("5000", "\N{ANGSTROM SIGN}", 0.5),
    ],
)
def test_ome_xml_states_the_pixel_size(size: str, unit: str | None, mpp: float) -> None:
    units = f'PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit else ""
    pixels = f'<Pixels PhysicalSizeX="{size}" PhysicalSizeY="{size}" {units}/>'
    xml = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>{pixels}'
    properties = {"tiff.ImageDescription": f"{xml}</Image></OME>"}
    found = resolve("s", properties | TAGS, vendor="generic-tiff", option=None)
    assert (found.mpp, found.source) == (mpp, "properties")
    broken = {"tiff.ImageDescription": xml}
    assert resolve("s", broken | TAGS, vendor="generic-tiff", option=None).mpp == 0.5


@pytest.mark.parametrize("dpi", [72, 96, 300, 600])
def test_resolutions_of_screen_and_print_are_no_scale(dpi: int) -> None:
    tags = {
        "tiff.XResolution": str(dpi),
        "tiff.YResolution": str(dpi),
        "tiff.ResolutionUnit": "inch",
    }
    derived = {"openslide.mpp-x": str(25400 / dpi), "openslide.mpp-y": str(25400 / dpi)}
    with pytest.raises(ResolutionError, match="--mpp"):
        resolve("s", tags | derived, vendor="generic-tiff", option=None)


def test_inch_tags_and_tags_without_unit() -> None:
    tags = {"tiff.XResolution": "50800", "tiff.YResolution": "50800"}
    assert resolve("s", tags | {"tiff.ResolutionUnit": "inch"}, vendor="x", option=None).mpp == 0.5
    with pytest.raises(ResolutionError):
        resolve("s", tags, vendor="x", option=None)


def test_anisotropy_over_one_percent_is_refused_unless_given() -> None:
    skewed = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.506"}
    with pytest.raises(ResolutionError, match="not square"):
        resolve("s", skewed, vendor="aperio", option=None)
    assert resolve("s", skewed, vendor="aperio", option=0.5).mpp == 0.5
    slight = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.504"}
    assert resolve("s", slight, vendor="aperio", option=None).mpp == pytest.approx(0.502)


@pytest.mark.parametrize("mpp", [0, -1, 0.009, 1001, math.nan, math.inf])
def test_absurd_options_are_refused(mpp: float) -> None:
    with pytest.raises(ResolutionError, match="between"):
        resolve("s", STATED, vendor="aperio", option=mpp)


@pytest.mark.parametrize("text", ["", "abc", "0", "nan", "-0.5"])
def test_nonsense_properties_count_as_missing(text: str) -> None:
    with pytest.raises(ResolutionError, match="does not state"):
        resolve(
            "s", {"openslide.mpp-x": text, "openslide.mpp-y": text}, vendor="aperio", option=None
        )
