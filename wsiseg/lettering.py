"""Text in pictures: its font, and how it fits into a width. Knows no pictures of its own."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

from wsiseg.names import plain

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@lru_cache(maxsize=16)
def font(size: int) -> Font:
    """The font of all pictures: DejaVu Sans, which comes with matplotlib.

    It has the letters of European languages, which Pillow's own font lacks.
    """
    found = importlib.util.find_spec("matplotlib")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size=size)


def shortened(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> str:
    """The text as one line, with its middle left out where it is too long."""
    text = plain(text)
    for keep in range(len(text), 1, -1):
        half = keep // 2
        short = text if keep == len(text) else f"{text[:half]}...{text[-half:]}"
        if draw.textlength(short, font=font(size)) <= width:
            return short
    return text[:2]
