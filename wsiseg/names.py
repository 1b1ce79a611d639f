"""Names of files as text that every format takes, and files that have none that tells."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePath

LONGEST_STEM = 180
"""Bytes of the longest stem of outputs: their temporary names add to it, and 255 are allowed."""
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]")


def plain(text: str) -> str:
    """A text of one line that UTF-8 and XML can hold: names of files may have bytes that are none,
    line ends and other control characters."""
    return _CONTROLS.sub(
        lambda found: found[0].encode("unicode_escape").decode(),
        text.encode("utf-8", "backslashreplace").decode("utf-8"),
    )


def usable_stem(stem: str) -> str:
    """A stem that files of outputs can have everywhere: UTF-8, in one line, and not too long.

    What is changed ends in a digest of what it was, so that no two become one.
    """
    data = stem.encode("utf-8", "surrogatepass")
    if plain(stem) == stem and len(data) <= LONGEST_STEM:
        return stem
    digest = hashlib.sha256(data).hexdigest()[:8]
    kept = plain(stem).replace("\\", "_").encode()[: LONGEST_STEM - 1 - len(digest)]
    return f"{kept.decode('utf-8', 'ignore')}-{digest}"


def as_written(root: Path, path: str) -> tuple[Path, str]:
    """`root` and the `path` below it, with each leading `..` taken off the names of `root`.

    Of a folder that is a link this is the folder beside the link, as one reads it; a file system
    goes up from where the link leads.
    """
    parts = PurePath(path).parts
    base = root.absolute() if parts[:1] == ("..",) else root
    while parts[:1] == ("..",) and base.name not in ("", ".."):
        base, parts = base.parent, parts[1:]
    return base, str(PurePath(*parts))


def is_dicom(path: Path) -> bool:
    """Whether a file is of DICOM (PS3.10), whatever its name: archives leave the suffix out."""
    try:
        with path.open("rb") as file:
            return len(file.read(128)) == 128 and file.read(4) == b"DICM"
    except OSError:
        return False
