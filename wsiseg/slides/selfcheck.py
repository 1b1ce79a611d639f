"""Whether the libraries that read slides work here. Knows no slides but one that it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Size
from wsiseg.slides.phantom import render_phantom, write_phantom
from wsiseg.slides.slide import BACKENDS, open_slide

SIZE = Size(600, 520)
TOLERANCE = 6.0
"""Mean difference of grey levels that the JPEG of the slide may cost."""


def openslide_version() -> str:
    """Version of the OpenSlide library itself."""
    return str(openslide.__library_version__)


def try_backends(folder: Path) -> dict[str, str]:
    """Write a small slide into a folder and read it with each backend.

    Returns:
        Backend to what is wrong with it, in one line; empty where it works.

    Raises:
        OutputError: the slide cannot be written.
    """
    path = folder / "check.tif"
    write_phantom(path, SIZE)
    wanted, _ = render_phantom(Box(0, 0, *SIZE), SIZE, mpp=0.5, seed=0)
    return {name: _problem(path, name, wanted) for name in BACKENDS[1:]}


def _problem(
    path: Path, backend: str, wanted: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> str:
    try:
        with open_slide(path, backend=backend) as slide:
            grid = slide.grid(0.5)
            pixels = slide.read(grid.box, grid)
    except SlideError as e:
        return str(e)
    if pixels.shape != wanted.shape:
        return (
            f"gave {pixels.shape[1]} x {pixels.shape[0]} px instead of {SIZE.width} x {SIZE.height}"
        )
    off = float(np.abs(pixels.astype(int) - wanted).mean())
    return f"gave other pixels (off by {off:.1f} grey levels)" if off > TOLERANCE else ""
