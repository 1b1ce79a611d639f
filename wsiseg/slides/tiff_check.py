"""Whether a TIFF file is whole. Knows the container (TIFF 6.0, BigTIFF), no pixels."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

_OFFSETS = {273: 279, 324: 325}  # strips and tiles: tag of the places, tag of the lengths
_NUMBER = {3: "u2", 4: "u4", 16: "u8"}


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_cut_short(path: Path) -> bool:
    """Whether a TIFF points beyond its end: to a directory, a strip or a tile that is not there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        big = head[2:3] == b"+" or head[3:4] == b"+"
        if len(head) < 16:
            return True
        place = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
        seen: set[int] = set()
        while place and place not in seen:
            seen.add(place)
            try:
                place, end = _directory(file, place, order, big)
            except (struct.error, ValueError, OSError):
                return True
            if end > size:
                return True
    return False


def _directory(file: IO[bytes], place: int, order: str, big: bool) -> tuple[int, int]:
    """The place of the next directory, and the end of the pixels of the one at `place`."""
    count_format, entry_format, next_format = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    file.seek(place)
    count = _unpack(file, order + count_format)[0]
    values: dict[int, npt.NDArray[np.uint64]] = {}
    entries = [_unpack(file, order + entry_format) for _ in range(count)]
    following = int(_unpack(file, order + next_format)[0])
    for tag, kind, number, inline in entries:
        if kind in _NUMBER and (tag in _OFFSETS or tag in _OFFSETS.values()):
            values[tag] = _array(file, order, order + _NUMBER[kind], number, inline)
    end = 0
    for places, lengths in _OFFSETS.items():
        if places in values and lengths in values and values[places].size:
            end = max(end, int((values[places] + values[lengths]).max()))
    return following, end


def _array(
    file: IO[bytes], order: str, dtype: str, number: int, inline: bytes
) -> npt.NDArray[np.uint64]:
    """The numbers of an entry, which lie inside it where they fit."""
    length = number * np.dtype(dtype).itemsize
    if length <= len(inline):
        data = inline[:length]
    else:
        file.seek(struct.unpack(order + ("Q" if len(inline) == 8 else "I"), inline)[0])
        data = file.read(length)
    if len(data) < length:
        raise ValueError("the file ends inside a list")
    return np.frombuffer(data, dtype).astype(np.uint64)


def _unpack(file: IO[bytes], form: str) -> tuple[int, int, int, bytes]:
    values: tuple[int, int, int, bytes] = struct.unpack(form, file.read(struct.calcsize(form)))
    return values
