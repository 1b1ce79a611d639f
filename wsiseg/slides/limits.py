"""How large a slide may say that it is, and why. Knows no files.

A header of a hundred bytes can state any size, and all work and memory follow from it. What no
scanner makes is refused before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from wsiseg.errors import SlideError
from wsiseg.geometry import Size

MAX_SIDE_PX = 2_000_000
"""Of level 0 and of what it is read at: 200 mm of glass at 0.1 um per pixel."""
MAX_AREA_PX = 200_000_000_000
"""Of the same: a slide of 75 x 26 mm at 0.1 um per pixel."""
MAX_CHUNK_PX = 1 << 26
"""Pixels of a tile, which is decoded whole: 8192 x 8192; real ones have up to 4096 x 4096."""
MAX_STRETCH = 4.0
"""How many times more a level may be reduced along one axis than along the other. Levels are
padded to whole tiles, so that small ones are not quite of the shape of level 0."""
_SMALL_PX = 16


def is_too_large(size: Size) -> bool:
    """Whether no slide has so many pixels."""
    return max(size) > MAX_SIDE_PX or size.width * size.height > MAX_AREA_PX


def check_levels(path: Path, sizes: tuple[Size, ...], chunks: Iterable[Size]) -> None:
    """Refuse a slide whose sizes cannot be.

    Args:
        path: the slide, for messages.
        sizes: of its levels, level 0 first.
        chunks: sizes of the chunks (tiles) that are decoded whole.

    Raises:
        SlideError: too many pixels or none, levels that are not of one shape, huge chunks.
    """
    if not sizes or min(min(size) for size in sizes) < 1:
        raise SlideError(f"{path}: has no pixels; the file is damaged, copy it again")
    for size in sizes:
        if is_too_large(size):
            raise SlideError(
                f"{path}: {size.width} x {size.height} px is more than any slide has; the file is "
                "damaged, copy it again"
            )
    for size in sizes[1:]:
        x, y = (full / part for full, part in zip(sizes[0], size, strict=True))
        if (min(size) > _SMALL_PX and max(x, y) > MAX_STRETCH * min(x, y)) or min(x, y) < 0.5:
            raise SlideError(
                f"{path}: a level of {size.width} x {size.height} px is not of the shape of level "
                f"0, {sizes[0].width} x {sizes[0].height} px; the file is damaged, copy it again"
            )
    for chunk in chunks:
        check_chunk(path, chunk)


def check_chunk(path: Path, size: Size) -> None:
    """Refuse chunks (tiles) that would take too much memory.

    Raises:
        SlideError: more than MAX_CHUNK_PX pixels.
    """
    if size.width * size.height > MAX_CHUNK_PX:
        raise SlideError(
            f"{path}: tiles of {size.width} x {size.height} px are too large to decode; convert it "
            "to a TIFF with tiles of 256 px"
        )
