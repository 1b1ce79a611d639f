"""What every slide decoder provides, and helpers that they share. Knows no library."""

from __future__ import annotations

import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box, Size

UInt8 = npt.NDArray[np.uint8]
TIFF_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    SyntaxError,
    struct.error,
)
"""What libraries raise for damaged or hostile files: MemoryError where a field asks for terabytes,
SyntaxError from the XML of a description."""
_FILTERS = threading.RLock()


class NotThisBackend(Exception):  # noqa: N818
    """The file is not of a format that this backend reads (inside this room only)."""


class Backend(Protocol):
    """An open slide file.

    Attributes:
        name: "openslide", "direct", "tiffslide" or "image".
        vendor: format family, as OpenSlide calls it.
        level_sizes: size of each level, level 0 first.
        level_downsamples: level-0 pixels per level pixel.
        properties: everything the file says of itself, as text.
        associated: sizes of label, macro and thumbnail images, by name.
    """

    name: str
    vendor: str
    level_sizes: tuple[Size, ...]
    level_downsamples: tuple[float, ...]
    properties: dict[str, str]
    associated: dict[str, Size]

    def read_level(self, level: int, box: Box) -> UInt8:
        """(h, w, 3) uint8 RGB of a box inside the level, white under transparent pixels.

        Raises:
            SlideReadError: the pixels cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


@contextmanager
def without_warnings(*packages: str) -> Iterator[None]:
    """Within the block, which should be short, no warning of some packages is shown.

    Filters of warnings are the whole process's: only one thread at a time is in such a block, and
    warnings of other packages, from whatever thread, are shown as ever.
    """
    with _FILTERS, warnings.catch_warnings():
        for package in packages:
            warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        yield


def over_white(rgba: UInt8) -> UInt8:
    """(h, w, 3) uint8 RGB of (h, w, 4) RGBA over white."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.size == 0 or alpha.min() == 255:
        return np.ascontiguousarray(rgb)
    a = alpha.astype(np.uint16)
    blended = (rgb * a + 255 * (255 - a) + 127) // 255
    return blended.astype(np.uint8)


def unreadable(path: Path, level: int, box: Box, error: Exception) -> SlideReadError:
    """The error for pixels that cannot be decoded, naming slide and place."""
    there = os.path.lexists(path)
    what = "is damaged, copy it again" if there else "is gone, put it back and go on"
    return SlideReadError(
        f"{path}: cannot read level {level} at x={box.x} y={box.y} "
        f"({box.width} x {box.height} px): {short_message(error)}; "
        f"the file {what}"
    )


def short_message(error: Exception) -> str:
    """The first line of an error, for a message."""
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__
