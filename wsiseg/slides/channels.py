"""Channels that an OME-TIFF keeps in planes of their own. Reads no pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from wsiseg.slides.backend_base import TIFF_ERRORS


def channels_apart(path: Path, properties: Mapping[str, str]) -> int:
    """How many channels there are, each in a plane of one sample; 0 where pixels are whole.

    Readers of slides take the first plane for a grey picture, without a word.

    Args:
        path: the file.
        properties: of the slide; its description is looked at first, so that no other is opened.
    """
    text = properties.get("tiff.ImageDescription", "")
    if "<OME" not in text[:2000]:
        return 0
    try:
        pixels = ElementTree.fromstring(text.encode()).find(".//{*}Pixels")
    except (ElementTree.ParseError, LookupError, ValueError):
        return 0
    channels = [] if pixels is None else pixels.findall("{*}Channel")
    apart = sum(c.get("SamplesPerPixel", "1") == "1" for c in channels)
    if apart < 2:
        return 0
    try:
        with tifffile.TiffFile(path) as tiff:
            samples = int(getattr(tiff.pages.first, "samplesperpixel", 1))
    except (tifffile.TiffFileError, *TIFF_ERRORS):
        return 0
    return apart if samples == 1 else 0
