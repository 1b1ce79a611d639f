"""What labelled images and their classes must be like in any data set. Knows no files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from wsiseg.errors import DatasetError

_LEAST_PX = 8


def plain(name: str) -> str:
    """A class name as it is compared: whatever its case and spaces."""
    return " ".join(name.casefold().split())


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two different spellings of one class name, None where there are none.

    Models and data sets are matched by names whatever their case and spaces, so such names
    cannot be two classes.
    """
    first: dict[str, str] = {}
    for name in names:
        seen = first.setdefault(plain(name), name)
        if seen != name:
            return seen, name
    return None


def warn_of_tiny(names: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> None:
    """Warn once of images that are too small to be meant.

    Args:
        names: of the images.
        sizes: height and width of each in pixels.
    """
    tiny = [(n, s) for n, s in zip(names, sizes, strict=True) if min(s) < _LEAST_PX]
    if tiny:
        name, (height, width) = tiny[0]
        more = f" and {len(tiny) - 1} more" if len(tiny) > 1 else ""
        warnings.warn(
            f"{name} ({width} x {height} px){more} of {len(names)} images: under {_LEAST_PX} px "
            "high or wide, of which nothing can be learnt; take them out, or give whole images",
            stacklevel=3,
        )


def check_depth(path: Path, image: Image.Image) -> None:
    """Refuse an image that Pillow cannot make RGB of without cutting off its values.

    Raises:
        DatasetError: it is grey of more than 8 bits.
    """
    if image.mode.startswith(("I", "F")):
        raise DatasetError(f"{path}: has more than 8 bits a channel; convert it to 8-bit RGB")
