"""Names of files as text that every format takes. Knows no files."""

from __future__ import annotations

import hashlib

LONGEST_STEM = 180
"""Bytes of the longest stem of outputs: their temporary names add to it, and 255 are allowed."""


def plain(text: str) -> str:
    """A text that UTF-8 can hold: names of files may have bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def usable_stem(stem: str) -> str:
    """A stem that files of outputs can have everywhere: UTF-8, and not too long.

    What is changed ends in a digest of what it was, so that no two become one.
    """
    data = stem.encode("utf-8", "surrogatepass")
    if plain(stem) == stem and len(data) <= LONGEST_STEM:
        return stem
    digest = hashlib.sha256(data).hexdigest()[:8]
    kept = plain(stem).replace("\\", "_").encode()[: LONGEST_STEM - 1 - len(digest)]
    return f"{kept.decode('utf-8', 'ignore')}-{digest}"
