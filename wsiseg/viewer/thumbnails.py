"""Small JPEGs of overview pictures. Knows no runs and no pages."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def thumbnail(path: Path, max_px: int, *, quality: int = 82) -> bytes | None:
    """A JPEG whose longer side is at most `max_px`; None where the picture cannot be read."""
    data = io.BytesIO()
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            small = image.convert("RGB")
        small.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
        small.save(data, "JPEG", quality=quality)
    except _UNREADABLE:
        return None
    return data.getvalue()
