"""Whether a TIFF file is whole and plausible. Knows the container (TIFF 6.0, BigTIFF) only."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.errors import SlideError
from wsiseg.geometry import Size
from wsiseg.slides.limits import check_chunk

_OFFSETS = {273: 279, 324: 325}  # strips and tiles: tag of the places, tag of the lengths
_TILE = (322, 323)  # tags of the width and the length of a tile
_NUMBER = {3: "u2", 4: "u4", 16: "u8"}
_MAX_ENTRIES = 65_535
"""Of a directory: a tag is a number of 16 bits and stands once."""
_MAX_DIRECTORIES = 10_000
"""Of a file; every plane of every level has one. Readers go through all of them more than once."""


class _Directory(NamedTuple):
    """What is looked at of a directory.

    Attributes:
        following: place of the next one, 0 after the last.
        end: end of the pixels that it points to.
        tile: size of its tiles; 0 x 0 where it has none.
    """

    following: int
    end: int
    tile: Size


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_tiff(path: Path) -> None:
    """Refuse a TIFF before a library reads it that would trust what it says.

    Raises:
        SlideError: it points beyond its end: to a directory, a strip or a tile that is not there;
            its directories run in a circle or have no end; its tiles are too large to decode.
    """
    with path.open("rb") as file:
        head = file.read(16)
        if len(head) < 16:
            raise _cut_short(path)
        container = _Container(
            file,
            order="<" if head[:2] == b"II" else ">",
            big=head[2:3] == b"+" or head[3:4] == b"+",
            size=path.stat().st_size,
        )
        place = container.first(head)
        seen: set[int] = set()
        while place:
            if place in seen or len(seen) >= _MAX_DIRECTORIES:
                raise SlideError(f"{path}: its directories have no end; the file is damaged")
            seen.add(place)
            try:
                found = container.directory(place)
            except (struct.error, ValueError, OSError) as e:
                raise _cut_short(path) from e
            if found.end > container.size:
                raise _cut_short(path)
            check_chunk(path, found.tile)
            place = found.following


def _cut_short(path: Path) -> SlideError:
    return SlideError(f"{path}: the file is cut short; copy it again")


class _Container:
    """A TIFF file, for its directories."""

    def __init__(self, file: IO[bytes], *, order: str, big: bool, size: int) -> None:
        self._file, self._order, self.size = file, order, size
        self._offset = order + ("Q" if big else "I")
        self._count = order + ("Q" if big else "H")
        self._entry = order + ("HHQ8s" if big else "HHI4s")
        self._first = 8 if big else 4

    def first(self, head: bytes) -> int:
        """The place of the first directory, from the first 16 bytes."""
        return int(struct.unpack_from(self._offset, head, self._first)[0])

    def directory(self, place: int) -> _Directory:
        """The directory at a place.

        Raises:
            struct.error, ValueError, OSError: it is not all there.
        """
        self._seek(place)
        count = self._unpack(self._count)[0]
        if count > _MAX_ENTRIES:
            raise ValueError("more entries than there are tags")
        entries = [self._unpack(self._entry) for _ in range(count)]
        following = int(self._unpack(self._offset)[0])
        values: dict[int, npt.NDArray[np.uint64]] = {}
        for tag, kind, number, inline in entries:
            if kind in _NUMBER and tag in (*_OFFSETS, *_OFFSETS.values(), *_TILE):
                values[tag] = self._array(self._order + _NUMBER[kind], number, inline)
        end = 0
        for places, lengths in _OFFSETS.items():
            if places in values and lengths in values and values[places].size:
                sums = values[places].astype(np.float64) + values[lengths]  # of uint64: overflow
                end = max(end, int(sums.max()))
        width, height = (int(values[t][0]) if len(values.get(t, ())) else 0 for t in _TILE)
        return _Directory(following, end, Size(width, height))

    def _array(self, dtype: str, number: int, inline: bytes) -> npt.NDArray[np.uint64]:
        """The numbers of an entry, which lie inside it where they fit."""
        length = number * np.dtype(dtype).itemsize
        if length > self.size:
            raise ValueError("a list longer than the file")
        if length <= len(inline):
            data = inline[:length]
        else:
            self._seek(struct.unpack(self._offset, inline)[0])
            data = self._file.read(length)
        if len(data) < length:
            raise ValueError("the file ends inside a list")
        return np.frombuffer(data, dtype).astype(np.uint64)

    def _seek(self, place: int) -> None:
        if place > self.size:
            raise ValueError("a place behind the end")
        self._file.seek(place)

    def _unpack(self, form: str) -> tuple[int, int, int, bytes]:
        data = self._file.read(struct.calcsize(form))
        values: tuple[int, int, int, bytes] = struct.unpack(form, data)
        return values
